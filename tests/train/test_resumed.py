"""What a checkpoint says of its training is checked before a step is taken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError
from pastkey.train.checkpoint import TOKENS_TRAIN, load_checkpoint
from pastkey.train.loop import train
from pastkey.train.resumed import read_training

from .helpers import tiny, write_corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(tiny(steps=2, save_every=2), folder / "c", data=[write_corpus(folder / "c.txt")])
    return folder / "c"


def altered(trained: Path, folder: Path, **changes: Any) -> Path:
    """A copy whose manifest says something else of the training."""
    shutil.copytree(trained, folder / "c")
    manifest = json.loads((folder / "c" / names.MANIFEST).read_text())
    manifest["training"] |= changes
    (folder / "c" / names.MANIFEST).write_text(json.dumps(manifest))
    return folder / "c"


def test_a_training_is_read(trained):
    found = read_training(load_checkpoint(trained))
    assert (found.step, found.config) == (2, tiny(steps=2, save_every=2))
    assert {name.rpartition(".")[2] for name in found.moments} == {"momentum", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_from_before_muon_goes_on_with_adamw(trained, tmp_path):
    checkpoint = load_checkpoint(trained)
    settings = {k: v for k, v in checkpoint.training["settings"].items() if k != "optimizer"}
    with pytest.raises(IntegrityError, match=r"proj\.weight\.exp_avg of shape"):
        read_training(load_checkpoint(altered(trained, tmp_path, settings=settings)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "2"}, "step is not a whole number"),
        ({"settings": []}, "settings is"),
        ({"settings": {"steps": True}}, "steps is True"),
        ({"settings": {"batch_size": 10.5}}, "it must be a whole number"),
        ({"settings": {"what": 1}}, "unknown key 'what'"),
        ({"data": {"corpus": "x"}}, "data has no"),
        ({"files": 3}, "has no list of files"),
    ],
)
def test_what_is_of_another_type_is_named(changes, words, trained, tmp_path):
    folder = altered(trained, tmp_path, **changes)
    with pytest.raises(IntegrityError, match=words):
        read_training(load_checkpoint(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "|O"}, "the type of the tokens"),
        ({"train_tokens": 5}, "which are not the 5 tokens"),
        ({"end": 10**6}, "holds the token id 1000000"),
        ({"end": 10**4000}, "end is a number of more than 80 digits"),
    ],
)
def test_tokens_that_the_manifest_does_not_speak_of_are_refused(changes, words, trained, tmp_path):
    data = load_checkpoint(trained).training["data"]
    folder = altered(trained, tmp_path, data={**data, **changes})
    with pytest.raises(IntegrityError, match=words):
        read_training(load_checkpoint(folder))


def test_moments_of_another_model_and_ids_of_no_token_are_refused(trained, monkeypatch):
    checkpoint = load_checkpoint(trained)
    from pastkey.train import resumed

    monkeypatch.setattr(resumed, "load_optimizer", lambda folder, training: {})
    with pytest.raises(IntegrityError, match="exp_avg of shape"):
        read_training(checkpoint)
    with pytest.raises(InputError, match="holds the model alone"):
        read_training(dataclasses.replace(checkpoint, training={}))
    monkeypatch.setattr(resumed, "_check_moments", lambda checkpoint, config, moments: None)
    tokens = trained / TOKENS_TRAIN
    whole = tokens.read_bytes()
    try:
        tokens.write_bytes(np.full(len(whole) // 2, 65535, "<u2").tobytes())
        with pytest.raises(IntegrityError, match="holds the token id 65535"):
            read_training(checkpoint)
    finally:
        tokens.write_bytes(whole)
