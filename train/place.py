"""Where a run writes: at its name, or with --force beside the folder that it replaces, until it has saved something.

    NAME            the old checkpoint, until the first save; from then on the new one
    NAME.training   the new run, which can be resumed; then the old one, until the run ends

One process at a time trains into a checkpoint: it holds the lock of the folder. What killed runs left is told.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pastkey import names
from pastkey.command import say
from pastkey.errors import ExistingFolderError, PastkeyError, ResourceError
from pastkey.folder import is_empty, read_json, refuse_existing, remove_folder, sha256, whole_folder, write_json
from pastkey.lock import locked
from pastkey.replace import leftovers, put_in_place, sync_folder

_SUFFIX = ".training"
_REPLACES = "training/replaces.json"  # of a run with --force: which manifest stood at its name


class Place:
    """The folder of one run, which `begin` fills. `saved` is to be told of each save, after which it may be another."""

    def __init__(self, out: Path, *, replaces: bool) -> None:
        self.out = out
        self.folder = beside(out) if replaces else out
        self._rest: Path | None = None  # what stood at `out`

    @property
    def moves(self) -> bool:
        """Whether the next save puts the run at its name."""
        return self.folder != self.out

    @contextlib.contextmanager
    def begin(self, stack: contextlib.ExitStack) -> Iterator[Path]:
        """Yields the folder to fill, which is whole at the end. `stack` then holds its lock."""
        with whole_folder(self.folder, force=is_empty(self.folder)) as work:
            (work / "training").mkdir()
            stack.enter_context(locked(work / "training", self.folder))
            yield work
            if self.moves:
                write_json(work / _REPLACES, {"manifest": sha256(self.out / names.MANIFEST)})

    def saved(self) -> None:
        """Exchanges the old and the new after the first save. Raises ResourceError where that cannot be done."""
        if not self.moves:
            return
        try:
            self._rest = put_in_place(self.folder, self.out)
        except PastkeyError:
            raise
        except OSError as error:
            raise ResourceError(
                f"{self.out} could not be replaced ({error}): it is as it was, and the new run is in {self.folder}; "
                f"go on with it by  --out {self.folder} --resume"
            ) from error
        self.folder = self.out
        sync_folder(self.out.absolute().parent)

    def end(self, *, learnt: bool, interrupted: bool) -> None:
        """Removes what the run replaced, or the run itself where it learnt nothing."""
        if self._rest is not None:
            _discard(self._rest, self.out)
        elif not learnt and (self.moves or not interrupted):
            _discard(self.folder, self.out)
        if not self.moves:
            self._forget()

    def finish(self) -> None:
        """Removes what a resumed run was to replace, when it has taken its last step."""
        if _is_replaced(self.out):
            _discard(beside(self.out), self.out)
        self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # it says nothing any more
            (self.out / _REPLACES).unlink(missing_ok=True)


def _discard(folder: Path, out: Path) -> None:
    """Removes a folder under a hidden name, so that a kill leaves nothing that looks like a checkpoint."""
    if not folder.exists():
        return
    hidden = folder
    with contextlib.suppress(OSError):  # then it is removed where it is
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.absolute().parent))
        folder.rename(hidden)
    for path in {folder, hidden}:
        remove_folder(path)


def beside(out: Path) -> Path:
    """NAME.training."""
    return out.with_name(out.name + _SUFFIX)


@contextlib.contextmanager
def new_place(out: Path, *, force: bool) -> Iterator[tuple[Place, contextlib.ExitStack]]:
    """Where a new run writes. Raises ExistingFolderError or InUseError before anything is written."""
    refuse_existing(out, force=force)
    replaces = out.exists() and not is_empty(out)
    for sentence in leftovers(out) + leftovers(beside(out)):
        say(sentence)
    with contextlib.ExitStack() as stack:
        if replaces:
            _hold_old(out, stack)
            _make_room(out)
        elif beside(out).exists():
            say(_left(out))
        yield Place(out, replaces=replaces), stack


@contextlib.contextmanager
def old_place(out: Path) -> Iterator[Place]:
    """Where a resumed run writes. Raises InUseError. What the run was to replace goes when it ends well."""
    with contextlib.ExitStack() as stack:
        if (out / "training").is_dir():
            stack.enter_context(locked(out / "training", out))
        for sentence in leftovers(out):
            say(sentence)
        if beside(out).exists() and not _is_replaced(out):
            say(_left(out))
        place = Place(out, replaces=False)
        yield place
        place.finish()


def _hold_old(out: Path, stack: contextlib.ExitStack) -> None:
    """Refuses to replace a checkpoint that another process trains, and keeps others from resuming it meanwhile."""
    if not (out / "training").is_dir():
        return
    with contextlib.suppress(PermissionError):  # nobody can train there, and the folder may still be renamed
        stack.enter_context(locked(out / "training", out))


def _make_room(out: Path) -> None:
    """Raises where NAME.training holds something: what a killed run left at step 0 is told, and removed."""
    training = beside(out)
    if not training.exists() or is_empty(training):
        return
    with contextlib.ExitStack() as stack:
        if (training / "training").is_dir():
            stack.enter_context(locked(training / "training", training))
        if (training / _REPLACES).is_file() and _step(training) == 0:
            say(f"{training} is what a killed run left at step 0, where nothing was learnt: it is removed")
            _discard(training, out)
            return
    raise ExistingFolderError(f"{_left(out)}; or rename or remove it, and begin again")


def _left(out: Path) -> str:
    training = beside(out)
    if _is_replaced(out):
        return (
            f"{training} is what the unfinished run in {out} replaces, and goes when that ends: "
            f"go on with it by  --out {out} --resume"
        )
    step = _step(training)
    if step is None:
        return f"{training} is there and no checkpoint: a run that replaces {out} is written there"
    return (
        f"{training} is a run at step {step}, which was to replace {out}: go on with it by  --out {training} --resume"
    )


def _is_replaced(out: Path) -> bool:
    """Whether NAME.training is what stood at NAME before the run that is there now."""
    try:
        return bool(read_json(out / _REPLACES)["manifest"] == sha256(beside(out) / names.MANIFEST))
    except (PastkeyError, OSError, KeyError):
        return False


def _step(folder: Path) -> int | None:
    try:
        training: Any = read_json(folder / names.MANIFEST).get("training")
    except (PastkeyError, OSError):
        return None
    step = training.get("step") if isinstance(training, dict) else None
    return step if isinstance(step, int) else None
