"""Each panel as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.image import imread

import pastkey
from pastkey.contract.bundle import Bundle
from pastkey.see.cli import PICTURES
from pastkey.see.inspection import inspect
from pastkey.see.panels import panels
from pastkey.see.pictures import picture
from pastkey.see.text import EXAMPLE, continued, stages


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_every_panel_can_be_drawn(bundle_of: Callable[..., Bundle], name: str) -> None:
    bundle = bundle_of(name)
    with pastkey.load(bundle.path, "cpu") as lm:
        text = continued(lm, [3, 1, 4, 1, 5], 3, {})
    seen = inspect(bundle, text.ids, text.following, shown=5)
    steps = list(stages(text, seen.first, seen.logits, EXAMPLE, 5))
    found = panels(bundle, None, text, seen, EXAMPLE, steps, ("other", seen.logits))
    drawn = {panel: picture(found, panel, 2) for panel in PICTURES}
    assert len(set(drawn.values())) == len(PICTURES)
    for content in drawn.values():
        pixels = imread(io.BytesIO(content))
        assert pixels.shape[1] > 200
        assert np.ptp(pixels[..., :3]) > 0.5
        assert len(content) < 150_000
    assert picture(found, "next", 2) != picture(found, "next", 1)
