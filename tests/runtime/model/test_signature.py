"""A signed bundle is known by a public key, and nothing else is opened before that."""

from __future__ import annotations

import json
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519

from pastkey.contract.bundle import open_bundle
from pastkey.contract.names import MANIFEST, SIGNATURE
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError
from pastkey.runtime import load
from pastkey.runtime.model.signature import new_key, require_signature, sign_bundle

Command = Callable[..., tuple[int, str, str]]
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
    expected = load(signed, threads=1).generate("abc", max_new_tokens=5).ids  # readers ignore it otherwise
    assert load(signed, threads=1, key=keys[1]).generate("abc", max_new_tokens=5).ids == expected
    assert load(str(signed), threads=1, key=str(keys[1])).generate("abc", max_new_tokens=5).ids == expected
    (signed / SIGNATURE).write_bytes(b"")
    assert open_bundle(signed, verify=True)


def test_signing_anew_replaces_the_signature(signed, keys, tmp_path):
    before = (signed / SIGNATURE).read_bytes()
    assert sign_bundle(signed, keys[0]).read_bytes() == before  # ed25519 draws nothing
    other = new_key(tmp_path / "other.pem")
    sign_bundle(signed, tmp_path / "other.pem")
    require_signature(signed, other)
    with pytest.raises(IntegrityError):
        require_signature(signed, keys[1])
    assert sorted(path.name for path in signed.iterdir() if path.name.startswith((".", SIGNATURE))) == [SIGNATURE]


def alter_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"source": "another"}), encoding="utf-8")


def lengthen(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("alter", "kind", "words"),
    [
        (
            alter_manifest,
            IntegrityError,
            "is not a signature of pastkey.json by the key in .*: the manifest was altered",
        ),
        (lambda folder: (folder / MANIFEST).write_bytes(b""), IntegrityError, "is not a signature of pastkey.json"),
        (lengthen, IntegrityError, "which has 65 bytes and not 64, is not a signature"),
        (lambda folder: (folder / SIGNATURE).write_bytes(bytes(64)), IntegrityError, "is not a signature"),
        (lambda folder: (folder / SIGNATURE).write_bytes(bytes(20_000)), InputError, "10,000 are the most"),
        (lambda folder: (folder / SIGNATURE).unlink(), MissingFileError, "is not signed: it has no pastkey.json.sig"),
        (lambda folder: (folder / MANIFEST).unlink(), MissingFileError, "is a bundle without its pastkey.json"),
        (shutil.rmtree, MissingFileError, "no such bundle"),
    ],
)
def test_whatever_is_not_as_it_was_signed_is_one_sentence(signed, keys, alter, kind, words):
    alter(signed)
    for check in (lambda: require_signature(signed, keys[1]), lambda: load(signed, key=keys[1])):
        with pytest.raises(kind, match=words) as raised:
            check()
        assert str(raised.value).count("\n") == 0


def test_an_altered_file_is_found_by_its_hash(signed, keys):
    load(signed, key=keys[1]).close()
    weights = next(signed.glob("onnx/*"))
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(IntegrityError, match="was altered: its sha256"):
        load(signed, key=keys[1])
    with pytest.raises(InputError, match="verify=False leaves hashes alone"):
        load(signed, key=keys[1], verify=False)


def test_what_is_not_whole_is_not_signed(signed, keys):
    (signed / SIGNATURE).unlink()
    weights = next(signed.glob("onnx/*"))
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(IntegrityError, match="was altered"):
        sign_bundle(signed, keys[0])
    assert not (signed / SIGNATURE).exists()


def private_pem(key: ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def encrypted() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )


def openssh() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def damaged() -> bytes:
    return private_pem(ed25519.Ed25519PrivateKey.generate()).replace(b"\nMC4", b"\nMA4")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: private_pem(ed448.Ed448PrivateKey.generate()), r"Ed25519PrivateKey .*it holds a Ed448PrivateKey"),
        (lambda: private_pem(ec.generate_private_key(ec.SECP256R1())), "it holds a ECPrivateKey"),
        (encrypted, "without a password .*Password was not given"),
        (openssh, "cannot be read as an Ed25519PrivateKey"),
        (lambda: b"", "cannot be read as an Ed25519PrivateKey .*pastkey sign --new-key FILE writes a pair"),
        (lambda: bytes(range(256)), "cannot be read"),
        (damaged, "cannot be read"),
        (lambda: b"-----BEGIN PRIVATE KEY-----\n", "cannot be read"),
        (lambda: bytes(20_000), "has 20,000 bytes, and 10,000 are the most"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_such_key_is_one_sentence(signed, tmp_path, content, words):
    file = tmp_path / "key.pem"
    if content is not None:
        file.write_bytes(content())
    before = (signed / SIGNATURE).read_bytes()
    with pytest.raises(PastkeyError, match=words) as raised:
        sign_bundle(signed, file)
    assert str(raised.value).count("\n") == 0
    assert (signed / SIGNATURE).read_bytes() == before


def test_a_key_file_of_any_bytes_is_a_key_or_a_sentence(signed, keys, tmp_path):
    rng, file, refused = random.Random(1), tmp_path / "altered.pem", 0
    for number in range(400):
        content = bytearray(keys[number % 2].read_bytes())
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            kind = rng.randrange(3)
            content[place : place + (0, 1, rng.randint(1, 20))[kind]] = bytes(rng.randbytes(kind != 2))
        file.write_bytes(content)
        try:
            sign_bundle(signed, file) if number % 2 == 0 else require_signature(signed, file)
        except PastkeyError:
            refused += 1
    assert 300 < refused < 400


def test_the_two_halves_are_not_taken_for_one_another(signed, keys):
    with pytest.raises(InputError, match="cannot be read as an Ed25519PrivateKey"):
        sign_bundle(signed, keys[1])
    with pytest.raises(InputError, match="cannot be read as an Ed25519PublicKey"):
        require_signature(signed, keys[0])


def test_a_new_key_replaces_none(tmp_path):
    file, public = tmp_path / "a.pem", new_key(tmp_path / "a.pem")
    assert public == tmp_path / "a.pub.pem"
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"a\.pem already exists, and a key that is overwritten is lost"):
        new_key(file)
    file.unlink()
    with pytest.raises(InputError, match=r"a\.pub\.pem already exists"):
        new_key(file)
    assert not file.exists()
    assert b"BEGIN PRIVATE KEY" in before
    with pytest.raises(OSError, match="No such file"):
        new_key(tmp_path / "no" / "folder.pem")


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not on this machine")
def test_openssl_makes_the_keys_and_checks_the_signature(speaking_bundle, tmp_path):
    folder, private, public = tmp_path / "bundle", tmp_path / "k.pem", tmp_path / "p.pem"
    shutil.copytree(speaking_bundle.path, folder)

    def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(OPENSSL), *map(str, arguments)], capture_output=True, text=True, check=False)

    if openssl("genpkey", "-algorithm", "ed25519", "-out", private).returncode:
        pytest.skip("this openssl knows no ed25519")
    assert openssl("pkey", "-in", private, "-pubout", "-out", public).returncode == 0
    signature = sign_bundle(folder, private)
    require_signature(folder, public)
    check = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", folder / MANIFEST, "-sigfile")
    assert openssl(*check, signature).returncode == 0
    made = tmp_path / "by_openssl.sig"
    assert openssl("pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", folder / MANIFEST, "-out", made).stdout == ""
    assert made.read_bytes() == signature.read_bytes()
    alter_manifest(folder)
    assert openssl(*check, signature).returncode != 0


def test_the_command_makes_a_key_and_signs(speaking_bundle, tmp_path, command):
    folder, key = tmp_path / "bundle", tmp_path / "me.pem"
    shutil.copytree(speaking_bundle.path, folder)
    status, out, err = command("sign", folder, "--new-key", key)
    assert (status, out) == (0, "")
    assert f"{key}: keep it private; {tmp_path / 'me.pub.pem'} is for those who verify" in err
    assert f"{folder / SIGNATURE}: signed" in err
    require_signature(folder, tmp_path / "me.pub.pem")
    assert command("sign", folder, "--key", key)[0] == 0
    for arguments, words in (
        (("sign", "--key", key), "--key signs a bundle: name its folder"),
        (("sign", folder), "one of the arguments --key --new-key is required"),
        (("sign", folder, "--key", ""), ". is a folder; a file was expected"),
        (("sign", "--new-key", ""), "'' is not the name of a file: name the private key, as in key.pem"),
        (("sign", "--new-key", "."), "'.' is not the name of a file"),
        (("sign", folder, "--new-key", key), "already exists, and a key that is overwritten is lost"),
        (("sign", tmp_path / "none", "--key", key), "no such bundle"),
    ):
        status, out, err = command(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_without_the_package_one_sentence_names_it(signed, keys):
    program = "import sys; sys.modules['cryptography'] = None; from pastkey.__main__ import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, "sign", str(signed), "--key", str(keys[0])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.count("\n") == 1
    assert "the package 'cryptography' is not installed" in done.stderr
    assert "pip install cryptography" in done.stderr
