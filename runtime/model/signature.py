"""Signatures of bundles. A signature proves who made a bundle; hashes only prove that it is undamaged.

The signature is ed25519 (RFC 8032) over the bytes of the manifest, which has the size and hash of every file.
pastkey.json.sig holds its 64 bytes, as `openssl pkeyutl -sign -rawin` writes them. Keys are PEM files, as `openssl
genpkey` writes them. The package cryptography, of the extra `sign`, computes signatures.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pastkey.contract.bundle import open_bundle
from pastkey.contract.names import MANIFEST, SIGNATURE
from pastkey.errors import InputError, IntegrityError, MissingFileError, first_line, missing_extra
from pastkey.files.durable import write_whole
from pastkey.files.folder import require_manifest
from pastkey.files.reading import MOST_JSON, read_bytes
from pastkey.values import as_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_MOST_KEY = 10_000  # bytes of a PEM file; one of ed25519 has 119
_BYTES = 64  # of a signature


def sign_bundle(bundle: str | Path, key: str | Path) -> Path:
    """Checks every hash of a bundle, then writes its signature next to the manifest.

    Args:
        bundle: The bundle's folder.
        key: A PEM file with a private ed25519 key (PKCS8, not encrypted).

    Returns:
        The signature's file.

    Raises:
        MissingFileError: There is no such bundle or file.
        IntegrityError: The bundle is incomplete or altered.
        InputError: The file does not hold such a key.
        MissingExtraError: cryptography is not installed.
    """
    private = _private_key(as_path(key, "key", "the path of a PEM file"))
    folder = open_bundle(bundle, verify=True).path
    write_whole(folder / SIGNATURE, private.sign(read_bytes(folder / MANIFEST, MOST_JSON)))
    return folder / SIGNATURE


def require_signature(bundle: str | Path, key: str | Path) -> None:
    """Raises IntegrityError unless the manifest of a bundle was signed by the private half of `key`.

    No other file of the bundle is opened. `open_bundle` checks them against the manifest afterwards.

    Args:
        bundle: The bundle's folder.
        key: A PEM file with a public ed25519 key.

    Raises:
        MissingFileError: There is no such bundle or file, or no signature.
        IntegrityError: The signature is not one of this manifest by this key.
        InputError: The file does not hold such a key.
        MissingExtraError: cryptography is not installed.
    """
    public = _public_key(as_path(key, "key", "the path of a PEM file"))
    folder = as_path(bundle, "bundle", "the path of a bundle folder")
    require_manifest(folder, "bundle")
    try:
        signature = read_bytes(folder / SIGNATURE, _MOST_KEY)
    except MissingFileError:
        raise MissingFileError(
            f"{folder} is not signed: it has no {SIGNATURE}; ask its author for a signed one, or open it without "
            "a key if you know where it comes from"
        ) from None
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, read_bytes(folder / MANIFEST, MOST_JSON))
    except InvalidSignature:
        size = "" if len(signature) == _BYTES else f", which has {len(signature)} bytes and not {_BYTES},"
        raise IntegrityError(
            f"{folder / SIGNATURE}{size} is not a signature of {MANIFEST} by the key in {key}: the manifest was "
            "altered, or another key signed it; do not open this bundle"
        ) from None


def new_key(path: str | Path) -> Path:
    """Writes a new private key to `path`, readable by its owner only, and its public half next to it.

    Returns:
        The public key's file: key.pub.pem next to key.pem.

    Raises:
        InputError: One of the two exists, or the path has no file name.
        MissingExtraError: cryptography is not installed.
    """
    private = as_path(path)
    if not private.name:
        raise InputError(f"{str(path)!r} is not the name of a file: name the private key, as in key.pem")
    public = private.with_suffix(".pub.pem")
    taken = next((file for file in (private, public) if os.path.lexists(file)), None)
    if taken is not None:
        raise InputError(f"{taken} already exists, and a key that is overwritten is lost: choose another name")
    with _cryptography():
        from cryptography.hazmat.primitives import serialization as form
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    write_whole(private, secret, mode=0o600)
    write_whole(public, key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return public


def _private_key(path: Path) -> Ed25519PrivateKey:
    with _cryptography():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    key: Ed25519PrivateKey = _loaded(path, Ed25519PrivateKey, lambda pem: load_pem_private_key(pem, password=None))
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    with _cryptography():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    key: Ed25519PublicKey = _loaded(path, Ed25519PublicKey, load_pem_public_key)
    return key


def _loaded(path: Path, kind: Any, parse: Callable[[bytes], Any]) -> Any:
    """Reads a PEM file. Raises InputError unless it holds a key of this kind, without a password."""
    content = read_bytes(path, _MOST_KEY)
    try:
        found = parse(content)
        reason = f"it holds a {type(found).__name__.strip('_')}"
    except Exception as error:  # cryptography raises ValueError, TypeError and its own errors
        found, reason = None, first_line(error)
    if not isinstance(found, kind):
        raise InputError(
            f"{path} cannot be read as an {kind.__name__} without a password ({reason}): pastkey sign --new-key FILE "
            "writes a pair of keys"
        )
    return found


@contextlib.contextmanager
def _cryptography() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
