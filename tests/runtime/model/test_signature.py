"""A signed bundle is known by a public key, and nothing else is opened before that."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519

from pastkey.contract.bundle import open_bundle
from pastkey.contract.names import MANIFEST, SIGNATURE
from pastkey.errors import InputError, IntegrityError, MissingExtraError, MissingFileError, PastkeyError
from pastkey.runtime import load
from pastkey.runtime.model.signature import new_key, require_signature, sign_bundle

OPENSSL = shutil.which("openssl")


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "me.pem", new_key(tmp_path / "me.pem")


@pytest.fixture
def signed(speaking_bundle, keys, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(speaking_bundle.path, folder)
    assert sign_bundle(folder, keys[0]) == folder / SIGNATURE
    return folder


def test_the_one_who_has_the_public_key_knows_the_bundle(signed, keys):
    require_signature(signed, keys[1])
    assert (signed / SIGNATURE).stat().st_size == 64
    for bundle, key in ((signed, None), (signed, keys[1]), (str(signed), str(keys[1]))):
        load(bundle, threads=1, key=key).close()
    (signed / SIGNATURE).write_bytes(b"")
    assert open_bundle(signed, verify=True)  # readers ignore it otherwise


def test_signing_anew_replaces_the_signature(signed, keys, tmp_path):
    before = (signed / SIGNATURE).read_bytes()
    assert sign_bundle(signed, keys[0]).read_bytes() == before  # ed25519 draws nothing
    other = new_key(tmp_path / "other.pem")
    sign_bundle(signed, tmp_path / "other.pem")
    require_signature(signed, other)
    with pytest.raises(IntegrityError):
        require_signature(signed, keys[1])
    assert sorted(path.name for path in signed.iterdir() if path.name.startswith((".", SIGNATURE))) == [SIGNATURE]


# --- a bundle that is not as it was signed --------------------------------------------------------------------------
def altered(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "another manifest": (altered(MANIFEST, lambda old: old.replace(b'"tiny"', b'"tony"')), IntegrityError, "altered"),
    "a longer signature": (altered(SIGNATURE, lambda old: old + b"\n"), IntegrityError, "has 65 bytes and not 64"),
    "another signature": (altered(SIGNATURE, lambda _: bytes(64)), IntegrityError, "is not a signature"),
    "a large signature": (altered(SIGNATURE, lambda _: bytes(20_000)), InputError, "at most 10,000 are allowed"),
    "no signature": (lambda folder: (folder / SIGNATURE).unlink(), MissingFileError, "is not signed"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), MissingFileError, r"without its pastkey\.json"),
    "no bundle": (shutil.rmtree, MissingFileError, "no such bundle"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bundle_that_is_not_as_it_was_signed_is_refused(signed, keys, case):
    alter, kind, words = REFUSED[case]
    alter(signed)
    for check in (lambda: require_signature(signed, keys[1]), lambda: load(signed, key=keys[1])):
        with pytest.raises(kind, match=words):
            check()


def test_an_altered_file_is_found_by_its_hash_and_not_signed(signed, keys):
    load(signed, key=keys[1]).close()
    weights = next(signed.glob("onnx/*"))
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(IntegrityError, match="was altered: its sha256"):
        load(signed, key=keys[1])
    with pytest.raises(InputError, match="verify=False checks no hashes"):
        load(signed, key=keys[1], verify=False)
    (signed / SIGNATURE).unlink()
    with pytest.raises(IntegrityError, match="was altered"):
        sign_bundle(signed, keys[0])
    assert not (signed / SIGNATURE).exists()


# --- keys -----------------------------------------------------------------------------------------------------------
def private_pem(key: Any = None, **options: Any) -> bytes:
    plain = {"format": serialization.PrivateFormat.PKCS8, "encryption_algorithm": serialization.NoEncryption()}
    key = key or ed25519.Ed25519PrivateKey.generate()
    found: bytes = key.private_bytes(serialization.Encoding.PEM, **plain | options)
    return found


LOCKED = serialization.BestAvailableEncryption(b"secret")
NO_KEY = {
    "of another curve": (private_pem(ed448.Ed448PrivateKey.generate()), "it holds a Ed448PrivateKey"),
    "encrypted": (private_pem(encryption_algorithm=LOCKED), "without a password .*Password was not given"),
    "of openssh": (private_pem(format=serialization.PrivateFormat.OpenSSH), "cannot be read as an Ed25519PrivateKey"),
    "empty": (b"", "cannot be read as an Ed25519PrivateKey .*pastkey sign --new-key FILE writes a pair"),
    "damaged": (private_pem().replace(b"\nMC4", b"\nMA4"), "cannot be read"),
    "large": (bytes(20_000), "has 20,000 bytes; at most 10,000 are allowed"),
}


@pytest.mark.parametrize("case", NO_KEY)
def test_a_file_that_is_no_such_key_is_refused(signed, tmp_path, case):
    content, words = NO_KEY[case]
    (tmp_path / "key.pem").write_bytes(content)
    before = (signed / SIGNATURE).read_bytes()
    with pytest.raises(PastkeyError, match=words):
        sign_bundle(signed, tmp_path / "key.pem")
    assert (signed / SIGNATURE).read_bytes() == before


def test_the_two_halves_are_not_taken_for_one_another(signed, keys):
    for check, key, kind in ((sign_bundle, keys[1], "Private"), (require_signature, keys[0], "Public")):
        with pytest.raises(InputError, match=f"cannot be read as an Ed25519{kind}Key"):
            check(signed, key)


def test_a_new_key_replaces_none(tmp_path):
    file, public = tmp_path / "a.pem", new_key(tmp_path / "a.pem")
    assert public == tmp_path / "a.pub.pem"
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(InputError, match=r"a\.pem already exists, and a key that is overwritten is lost"):
        new_key(file)
    file.unlink()
    with pytest.raises(InputError, match=r"a\.pub\.pem already exists"):
        new_key(file)
    assert not file.exists()


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not on this machine")
def test_openssl_makes_the_keys_and_checks_the_signature(signed, tmp_path):
    private, public = tmp_path / "k.pem", tmp_path / "p.pem"

    def openssl(*arguments: str | Path) -> bool:
        return subprocess.run([str(OPENSSL), *map(str, arguments)], capture_output=True, check=False).returncode == 0

    if not openssl("genpkey", "-algorithm", "ed25519", "-out", private):
        pytest.skip("this openssl knows no ed25519")
    assert openssl("pkey", "-in", private, "-pubout", "-out", public)
    signature = sign_bundle(signed, private)
    require_signature(signed, public)
    check = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", signed / MANIFEST, "-sigfile")
    assert openssl(*check, signature)


def test_without_the_package_one_sentence_names_it(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(MissingExtraError, match=r"'cryptography' is not installed.*pip install '\.\[sign\]'"):
        sign_bundle(signed, keys[0])
