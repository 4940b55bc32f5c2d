"""`pastkey sign`: a key is made, a bundle is signed."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("cryptography")

from pastkey.contract.names import SIGNATURE
from pastkey.runtime.model.signature import require_signature


def test_a_key_is_made_and_signs(talking, tmp_path, command):
    folder, key = shutil.copytree(talking, tmp_path / "bundle"), tmp_path / "me.pem"
    status, out, err = command("sign", folder, "--new-key", key)
    assert (status, out) == (0, "")
    assert f"{key}: keep it private; {tmp_path / 'me.pub.pem'} is for those who verify" in err
    assert f"{folder / SIGNATURE}: signed" in err
    require_signature(folder, tmp_path / "me.pub.pem")
    assert command("sign", folder, "--key", key)[0] == 0
