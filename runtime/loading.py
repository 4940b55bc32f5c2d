"""Opening a bundle, wherever it lies: a folder, a zip file, bytes, or a resource of a package."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Collection, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from pastkey.bundle import open_bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError, first_line
from pastkey.folder import is_inside
from pastkey.names import MANIFEST
from pastkey.reading import reading
from pastkey.values import is_int, shown

from .batching.prefix_store import PREFIX_BYTES
from .batching.scheduler import MAX_ROWS
from .draft_model import DraftModel
from .language_model import LanguageModel
from .settings import Choice, SessionSettings
from .signature import require_signature

_MOST_TIMES, _ALWAYS = 20, 10_000_000  # how much larger than its zip file a bundle may be, and bytes that it may be


def load(
    path: str | Path | bytes | Traversable,
    providers: Choice | Sequence[Choice] | None = None,
    threads: int | None = None,
    verify: bool | None = None,
    *,
    key: str | Path | None = None,
    allow_fallback: bool = False,
    session_options: SessionSettings | None = None,
    max_memory: int | None = None,
    prefix_bytes: int = PREFIX_BYTES,
    max_batch: int = MAX_ROWS,
    draft: str | Path | bytes | Traversable | LanguageModel | None = None,
) -> LanguageModel:
    """Opens a bundle.

    Args:
        path: The folder that `pastkey export` wrote, a zip file of it, the bytes of one, or a folder or zip file of
            `importlib.resources`. A zip file is unpacked to a temporary folder until the model is closed or collected,
            for the weights to be mapped.
        providers: Execution providers in order of preference, by short names ("cuda") or onnxruntime's, each alone or
            as a pair with its options. None takes the one that the bundle was made for. One that is not on this
            machine is an error.
        threads: Number of threads within an operator. None takes the physical cores.
        verify: True hashes every file again, False no file, None those that changed since they were hashed last.
        key: A PEM file with the public ed25519 key whose signature the bundle must have, as `pastkey sign` makes it. It
            is looked at before anything else of the bundle is read, and hashes are then not left alone.
        allow_fallback: Whether the processor may run what a provider that was asked for leaves. Without it a provider
            that was seen to run a whole graph runs all of this one, or is an error that names the operators; of any
            other one a FallbackWarning names them.
        session_options: What onnxruntime's session options are set to: attributes of onnxruntime.SessionOptions,
            {"enable_cpu_mem_arena": False, "graph_optimization_level": "ORT_ENABLE_BASIC"}, and entries by their names
            with a dot, {"session.use_env_allocators": "1"}. What pastkey sets itself, as the threads, is an error.
        max_memory: Bytes that all caches of the model may take together. A call that might need more raises
            ResourceError before it begins. `lm.memory.estimate(tokens)` tells what a cache takes. None for no limit.
        prefix_bytes: Bytes that the caches of earlier texts may take, which `reuse_prefix` and conversations go on
            from; the least recently used goes first.
        max_batch: How many generations are decoded in one run, at most; 1 lets them take turns.
        draft: A smaller bundle of the same vocabulary, as `path`, or a model that is loaded. It drafts tokens that
            this one accepts or rejects several at a time, where that is faster; docs/speculation.md has how. A path is
            loaded with the same providers, threads, session options and key, and closed with this model.

    Raises:
        MissingFileError: There is no bundle at `path`.
        IntegrityError: A file is missing, truncated or altered, or onnxruntime cannot load it, or the signature is not
            that of `key`.
        ProviderError: A provider is unknown, not on this machine, does not start, or leaves a part of the graph.
        MissingExtraError: onnxruntime is not installed, or older than the bundle needs; or a signature was asked for,
            and cryptography is not installed.
        InputError: An argument has another type, or is out of range; or a session option is pastkey's own; or `draft`
            has another vocabulary, or is of no use to this bundle.
    """
    if threads is not None and not is_int(threads):
        raise InputError(f"threads is {threads!r}; a whole number was expected, or None for the physical cores")
    if not (providers is None or _is_choice(providers)) and not (
        isinstance(providers, Collection) and all(map(_is_choice, providers))
    ):
        raise InputError(
            f'providers is {providers!r}; a name such as "cuda", a pair of a name and its options, or a list of these '
            "was expected"
        )
    if session_options is not None and not (
        isinstance(session_options, Mapping) and all(isinstance(name, str) for name in session_options)
    ):
        raise InputError(
            f"session_options is {session_options!r:.80}; a mapping of names to values such as "
            '{"enable_cpu_mem_arena": False} was expected'
        )
    for name, value, least in (
        ("max_memory", max_memory, 1),
        ("prefix_bytes", prefix_bytes, 0),
        ("max_batch", max_batch, 1),
    ):
        if not is_int(value, least) and not (value is None and name == "max_memory"):
            raise InputError(f"{name} is {value!r}; a whole number from {least} was expected")
    if key is not None and not isinstance(key, str | os.PathLike):
        raise InputError(f"key is {type(key).__name__}; the path of a PEM file with a public key was expected")
    if key is not None and verify is False:
        raise InputError("verify=False leaves hashes alone, and without them a signature (key=...) says nothing")
    folder, temporary = _folder_of(path)
    drafts = None
    try:
        if key is not None:
            require_signature(folder, key)
        bundle = open_bundle(folder, verify=verify)
        if isinstance(draft, LanguageModel):
            drafts = DraftModel(draft, opened=False)
        elif draft is not None:
            opened = load(
                draft,
                providers,
                threads,
                verify,
                key=key,
                allow_fallback=allow_fallback,
                session_options=session_options,
            )
            drafts = DraftModel(opened, opened=True)
        model = LanguageModel(
            bundle,
            providers=providers,
            threads=threads,
            allow_fallback=allow_fallback,
            session_options=session_options,
            max_memory=max_memory,
            prefix_bytes=prefix_bytes,
            max_batch=max_batch,
            draft=drafts,
            temporary=None if temporary is None else weakref.finalize(temporary, shutil.rmtree, folder, True),
        )
    except BaseException:
        if drafts is not None:
            drafts.close()
        if temporary is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if temporary is not None:
        model.holds = temporary
    return model


class _Temporary:
    """What a temporary folder lives as long as."""


def _folder_of(path: object) -> tuple[Path, _Temporary | None]:
    """The bundle's folder, and what a temporary one is tied to. Raises InputError, IntegrityError, MissingFileError."""
    if isinstance(path, bytes | bytearray | memoryview):
        return _unpacked(io.BytesIO(path), "the bytes")
    if isinstance(path, str | os.PathLike):
        place = Path(path)
        if place.is_file() and zipfile.is_zipfile(place):
            with place.open("rb") as file:
                return _unpacked(file, str(place))
        return place, None
    if isinstance(path, Traversable):
        if path.is_file():
            return _unpacked(io.BytesIO(path.read_bytes()), path.name)
        if not path.is_dir():
            raise MissingFileError(f"no such bundle: {path.name} is not in its package")
        folder = Path(tempfile.mkdtemp(prefix="pastkey-"))
        _copy(path, folder)
        return folder, _Temporary()
    raise InputError(
        f"path is {path!r}; the path of a bundle folder was expected, as a str or a Path, or a zip file of one, its "
        "bytes, or a resource of a package"
    )


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for part in source.iterdir():
        if part.is_dir():
            _copy(part, target / part.name)
        else:
            with part.open("rb") as read, (target / part.name).open("wb") as written:
                shutil.copyfileobj(read, written)


def _unpacked(file: object, name: str) -> tuple[Path, _Temporary]:
    """A temporary folder with what stands beside the manifest in a zip file."""
    try:
        archive = zipfile.ZipFile(file)  # type: ignore[call-overload]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise InputError(f"{name:.60} are no zip file of a bundle folder") from None
    with archive, reading(name, "a zip file of a bundle"):
        stored, unpacked = _sizes(archive)
        if unpacked > _MOST_TIMES * stored + _ALWAYS:
            raise IntegrityError(
                f"{name} would be unpacked to {unpacked:,} bytes, more than {_MOST_TIMES} times its {stored:,}: no "
                "bundle is, and it is left alone"
            )
        manifests = sorted((entry for entry in archive.namelist() if Path(entry).name == MANIFEST), key=len)
        if not manifests:
            raise MissingFileError(f"{name} holds no bundle: it has no {MANIFEST}")
        root = manifests[0].removesuffix(MANIFEST)
        folder = Path(tempfile.mkdtemp(prefix="pastkey-"))
        try:
            for entry in archive.infolist():
                inner = entry.filename.removeprefix(root)
                if entry.is_dir() or not entry.filename.startswith(root):
                    continue
                if not is_inside(inner):
                    raise IntegrityError(f"{name} names {shown(inner)}, which is not a path inside the folder")
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as read, (folder / inner).open("wb") as written:
                    shutil.copyfileobj(read, written)
        except (zipfile.BadZipFile, EOFError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise IntegrityError(
                f"{name} cannot be unpacked ({first_line(error, 100)}): it was cut or altered"
            ) from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder, _Temporary()


def _sizes(archive: zipfile.ZipFile) -> tuple[int, int]:
    """Bytes of all files, as they are stored, and as they say that they are unpacked to, which is where each is cut."""
    entries = archive.infolist()
    return sum(entry.compress_size for entry in entries), sum(entry.file_size for entry in entries)


def _is_choice(value: object) -> bool:
    """Whether it names one execution provider, with options or without."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[0], str) and isinstance(value[1], dict)
    return isinstance(value, str)
