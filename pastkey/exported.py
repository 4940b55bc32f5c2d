"""The bundles that `chat`, `run` and `see` export themselves, once for each source, in the user's cache folder.

A separate process exports: the one that runs the bundle never imports torch.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .command import say
from .contract import names
from .contract.bundle import open_bundle
from .contract.source_files import source_files
from .errors import InputError, IntegrityError, InUseError, MissingFileError, ResourceError
from .files.durable import locked
from .files.folder import hub_id, needs_huggingface, user_cache_file

# As `python -m pastkey`, which would also import modules of the current folder: a model's folder may hold anything.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from pastkey.__main__ import main; sys.exit(main())"
)


def exported(source: str, *, untrusted: bool = False, chats: bool = False) -> str:
    """Returns the path of a bundle: the cached export of a Hub id, a Hugging Face folder or a GGUF file.

    A cached export that is damaged is made again. Any other path is returned as it is. Raises ResourceError if the
    cache cannot be written, InputError for a source that is `untrusted`, since no limits hold for an export, or that
    has no chat template where it `chats`, and SystemExit with the status of an export that failed, which has told why.
    """
    if not needs_huggingface(source) or not (hub_id(source) or Path(source).exists()):
        return source
    cache = user_cache_file("bundles")
    if untrusted:
        if (
            cache is not None and (cache / _names(source)[1]).is_dir()
        ):  # made by an earlier command, and not opened here
            return str(cache / _names(source)[1])
        raise InputError(
            f"{source} is a model to export, and --untrusted opens only a bundle: an export reads the model's files "
            f"outside the child process with limits; if you trust them, {_by_hand(source)}"
        )
    if cache is None:
        raise ResourceError(f"there is no home folder to keep the export of {source} in: {_by_hand(source)}")
    family, bundle = _names(source)
    target = cache / bundle
    if _opens(target):
        return str(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f"{family}.lock").touch()
    except OSError as error:
        raise ResourceError(
            f"the cache folder {cache} cannot be written ({error.strerror}): name another with XDG_CACHE_HOME, or "
            + _by_hand(source)
        ) from None
    with _one_at_a_time(cache / f"{family}.lock", source):
        if not _opens(target):  # another process may have exported it
            if target.exists():
                say(f"the export of {source} in {target} is damaged: it is made again")
                shutil.rmtree(target)
            if chats:
                _require_chat_template(Path(source))
            _export(source, target)
            _remove_older(target, family)
    return str(target)


def _require_chat_template(folder: Path) -> None:
    """Raises InputError for a folder that has no chat template, before an export of minutes."""
    tokenizer = folder / names.TOKENIZER_CONFIG
    told = tokenizer.is_file() and b'"chat_template"' in tokenizer.read_bytes()
    if folder.is_dir() and not told and not any(folder.glob("chat_template*")):
        raise InputError(
            f"{folder} has no chat template, so that its model continues texts and holds no conversation: use  pastkey "
            f"run {shlex.quote(str(folder))} --prompt TEXT  or give a template with --template FILE"
        )


def _opens(bundle: Path) -> bool:
    try:
        open_bundle(bundle)
    except (InputError, IntegrityError, MissingFileError):
        return False
    return True


def _by_hand(source: str) -> str:
    return f"type  pastkey export {shlex.quote(source)} --out bundle  and name that folder"


def _names(source: str) -> tuple[str, str]:
    """Returns the name of a source, and that of its export: a changed file or folder has another one."""
    name = hub_id(source)
    if name is not None:
        family = name.replace("/", "--")  # as in the cache of huggingface_hub; an id has no -- itself
        return family, family
    path = Path(source).resolve()
    state = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in source_files(path).items()]
    family = f"{path.name[:80]}-{_hash(path)}"
    return family, f"{family}-{_hash(state)}"


def _hash(content: object) -> str:
    return hashlib.sha256(os.fsencode(str(content))).hexdigest()[:12]


@contextlib.contextmanager
def _one_at_a_time(lock: Path, source: str) -> Iterator[None]:
    """Waits for another process that exports the same source."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except InUseError:
            say(f"another process exports {source}: waiting for its end")
            held.enter_context(locked(lock, wait=True))
        yield


def _export(source: str, target: Path) -> None:
    """Runs `pastkey export`. Raises SystemExit if it fails."""
    command = [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), "export", source, "--out", str(target)]
    # In a separate session, Ctrl-C reaches only this process, which ends the other once.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        status = child.wait()
    except BaseException:
        child.terminate()  # it removes its unfinished files
        child.wait()
        raise
    if status < 0:
        raise ResourceError(
            f"the export of {source} was ended by signal {-status}, often because memory is short: end other "
            "programs, or " + _by_hand(source)
        )
    if status and not target.exists():  # where there are no locks, another process may have been first
        raise SystemExit(status)


def _remove_older(target: Path, family: str) -> None:
    """Removes the exports of a source as it was before."""
    for older in target.parent.glob(f"{glob.escape(family)}-*"):
        if older != target and older.is_dir():
            shutil.rmtree(older, ignore_errors=True)
