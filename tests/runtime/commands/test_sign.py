"""`pastkey sign`: a key is made, a bundle is signed."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("cryptography")

from pastkey.contract.names import SIGNATURE
from pastkey.runtime.model.signature import require_signature


@pytest.fixture
def folder(talking, tmp_path):
    return shutil.copytree(talking, tmp_path / "bundle")


def test_a_key_is_made_and_signs(folder, tmp_path, command):
    key = tmp_path / "me.pem"
    status, out, err = command("sign", folder, "--new-key", key)
    assert (status, out) == (0, "")
    assert f"{key}: keep it private; {tmp_path / 'me.pub.pem'} is for those who verify" in err
    assert f"{folder / SIGNATURE}: signed" in err
    require_signature(folder, tmp_path / "me.pub.pem")
    assert command("sign", folder, "--key", key)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--key", "key.pem"), "--key signs a bundle: name its folder"),
        (("b",), "one of the arguments --key --new-key is required"),
        (("b", "--key", ""), ". is a folder; a file was expected"),
        (("--new-key", "."), "'.' is not the name of a file"),
    ],
)
def test_mistakes_are_one_sentence(command, arguments, words):
    status, out, err = command("sign", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
