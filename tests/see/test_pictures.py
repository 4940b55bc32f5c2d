"""Each panel as a picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import pastkey
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError
from pastkey.see.cli import PICTURES
from pastkey.see.inspection import inspect
from pastkey.see.panels import panels
from pastkey.see.pictures import picture
from pastkey.see.text import EXAMPLE, continued, stages


def panels_of(bundle: Bundle, *, reference: bool = False) -> dict[str, Any]:
    with pastkey.load(bundle.path, "cpu") as lm:
        text = continued(lm, [3, 1, 4, 1, 5], 3, {})
    seen = inspect(bundle, text.ids, text.following, shown=5)
    steps = list(stages(text, seen.first, seen.logits, EXAMPLE, 5))
    return panels(bundle, None, text, seen, EXAMPLE, steps, ("other", seen.logits) if reference else None)


def test_every_panel_can_be_drawn(bundle_of):
    found = panels_of(bundle_of("plain"), reference=True)
    found["text"]["at"] = 2
    drawn = {panel: picture(found, panel) for panel in PICTURES}
    assert len(set(drawn.values())) == len(PICTURES)
    for content in drawn.values():
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[1] > 200
        assert np.ptp(pixels[..., :3]) > 0.5
        assert len(content) < 150_000
    found["text"]["at"] = 1
    assert {panel for panel in PICTURES if picture(found, panel) != drawn[panel]} == {"next", "sampler"}


def test_a_picture_of_nothing_or_of_too_much_is_refused(bundle_of):
    found = panels_of(bundle_of("llama"))
    with pytest.raises(InputError, match="there is no panel reference: no --reference is given"):
        picture(found, "reference")
    found["embedding"], found["layers"]["at"] = None, [None, None]
    for name in ("embedding", "layers"):
        with pytest.raises(InputError, match=f"there is no panel {name}: this decoder has no single vector"):
            picture(found, name)
    found["attention"]["heads"] = [*range(40)]
    with pytest.raises(InputError, match="2 layers and 40 heads over 5 tokens is too large"):
        picture(found, "attention")
    found["vocabulary"] = ["$x$ 犬"] * len(found["vocabulary"])
    assert picture(found, "tokens")  # letters that the font lacks are their codes, without a warning
