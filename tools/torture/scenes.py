"""The scenes of test_torture.py: how each thing is written, and what must hold at every moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pastkey.contract.bundle import open_bundle
from pastkey.files.durable import remove_leftovers
from pastkey.runtime import load
from tests.runtime import conftest as decoder
from tests.runtime.bulk.rows import plain_rows, write_rows
from tests.tiny_bundles import letters_bundle

from .__main__ import Nursery, Outcome, save_a_session


def speaking(bundle: Path) -> Path:
    """Returns a small bundle with a tokenizer; creates it if it is missing."""
    return bundle if bundle.exists() else letters_bundle(bundle).path


class Scene:
    """Something that is written: how, and what must hold after any interruption."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.given, self.work = folder, work
        self.below = work

    def prepare(self, nursery: Nursery) -> None:
        """Makes what each try begins with."""

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def command(self) -> dict[str, Any]:
        raise NotImplementedError

    def check(self) -> None:
        """Checks what must hold at every moment."""
        raise NotImplementedError

    def ended(self) -> None:
        """Checks what must hold after an uninterrupted command: nothing is left of earlier interrupted ones."""
        self.check()
        assert not [path for path in self.below.rglob("*") if path.name.endswith((".new", ".partial", ".old"))]

    def run(self, nursery: Nursery, **how: Any) -> Outcome:
        asked = self.command()
        return nursery.run(*asked.get("arguments", ()), function=asked.get("function"), **how)


class Write(Scene):
    """The end of an export over another, which writes: a bundle's files, and the renames."""

    def prepare(self, nursery: Nursery) -> None:
        for name, context in (("old", 11), ("new", 12)):
            if not (self.given / name).exists():
                tiny = decoder.Tiny.random([(8, 8)], context_length=context)
                decoder.write_bundle(self.given / name, tiny, "fused")

    def reset(self) -> None:
        super().reset()
        self.out = self.work / "b"
        shutil.copytree(self.given / "old", self.out)

    def command(self) -> dict[str, Any]:
        return {"function": "tools.torture.__main__:write_bundle", "arguments": (self.given / "new", self.out)}

    def check(self) -> None:
        remove_leftovers(self.out)  # as the next write to this name does
        assert open_bundle(self.out, verify=True).manifest.context_length in (11, 12)

    def ended(self) -> None:
        super().ended()
        assert open_bundle(self.out, verify=True).manifest.context_length == 12


class SavedSession(Scene):
    """A session saved over an earlier one."""

    def prepare(self, nursery: Nursery) -> None:
        self.bundle = speaking(self.given / "tiny")
        self.model = load(self.bundle, threads=1)

    def reset(self) -> None:
        super().reset()
        self.file = self.work / "one.session"
        save_a_session(str(self.bundle), str(self.file), "2")

    def command(self) -> dict[str, Any]:
        return {"function": "tools.torture.__main__:save_a_session", "arguments": (self.bundle, self.file, 90)}

    def check(self) -> None:
        with self.model.load_session(self.file) as session:
            assert len(session) in (2, 90)


class Batch(Scene):
    """A job over rows that continues after each kill: written rows stay, each row once, and the end is the same."""

    def prepare(self, nursery: Nursery) -> None:
        self.bundle, self.rows = speaking(self.given / "tiny"), self.given / "rows.jsonl"
        if not self.rows.exists():
            write_rows(self.rows, [*plain_rows(150), "no row", *({"id": n, "prompt": "a"} for n in range(150, 300))])
            outcome = nursery.run(*self.batch(self.given / "whole.jsonl"))
            assert outcome.status == 0, outcome.said

    def batch(self, out: Path) -> tuple[object, ...]:
        flags = ("--temperature", 1, "--max-new-tokens", 4, "--threads", 1)
        return ("batch", self.bundle, self.rows, "--out", out, *flags)

    def reset(self) -> None:
        super().reset()
        self.out, self.written = self.work / "out.jsonl", b""

    def command(self) -> dict[str, Any]:
        return {"arguments": self.batch(self.out)}

    def answers(self, out: Path) -> set[bytes]:
        """Returns the complete lines, each of another row."""
        lines = out.read_bytes().split(b"\n")[:-1]
        assert len({json.loads(line)["id"] for line in lines}) == len(lines)
        return set(lines)

    def check(self) -> None:
        if self.out.exists():
            assert self.answers(self.out) <= self.answers(self.given / "whole.jsonl")
            content = self.out.read_bytes()
            assert content.startswith(self.written)
            self.written = content[: content.rfind(b"\n") + 1]

    def ended(self) -> None:
        super().ended()
        assert self.answers(self.out) == self.answers(self.given / "whole.jsonl")
        assert sorted(path.name for path in self.work.iterdir()) == ["out.jsonl", "out.jsonl.job"]


SCENES: dict[str, tuple[Callable[[Path, Path], Scene], float, int]] = {
    # what is written, its share of the kills, and the number of kills in the short form
    "session": (SavedSession, 0.3, 5),
    "bundle": (Write, 0.6, 10),
    "batch": (Batch, 0.1, 10),
}
