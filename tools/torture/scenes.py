"""The scenes of test_torture.py: how each thing is written, and what must hold at every moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pastkey.contract.bundle import open_bundle
from pastkey.runtime import load
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from tests.export.commands import FACTORY
from tests.runtime import conftest as decoder
from tests.runtime.bulk.rows import plain_rows, write_rows
from tests.tiny_bundles import letters_bundle
from tests.train.helpers import TINY, flags, write_corpus

from .__main__ import Nursery, Outcome, save_a_session

FLAGS = flags(TINY | {"steps": 6, "save_every": 2})
Files = dict[str, bytes]


def files(folder: Path) -> Files:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def trained(folder: Path) -> Files:
    """Returns the files of a finished run, without its speed."""
    found = files(folder)
    manifest = json.loads(found.pop("pastkey.json"))
    del manifest["training"]["figures"]["tokens_per_second"]
    found.pop("loss.png", None)  # missing after a kill between the last save and the curve
    return found | {"pastkey.json": json.dumps(manifest).encode()}


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


class Train(Scene):
    """A run with --force over a finished one: the folder holds the old run, or the new one from its first save on.

    It is resumed after each kill, and must end like an uninterrupted one.
    """

    def prepare(self, nursery: Nursery) -> None:
        write_corpus(self.given / "text.txt")
        for seed in (0, 1):
            if not (self.given / f"seed{seed}").exists():
                assert nursery.run(*self.train(self.given / f"seed{seed}", seed)).status == 0

    def train(self, out: Path, seed: int) -> tuple[object, ...]:
        return ("train", "--out", out, "--data", self.given / "text.txt", *FLAGS, "--seed", seed, "--force")

    def reset(self) -> None:
        super().reset()
        self.out, self.step = self.work / "c", -1
        shutil.copytree(self.given / "seed0", self.out)

    def replaced(self) -> bool:
        return bool(load_checkpoint(self.out).training["settings"]["seed"] == 1)

    def command(self) -> dict[str, Any]:
        resumed = ("train", "--out", self.out, "--resume")
        return {"arguments": resumed if self.replaced() else self.train(self.out, 1)}

    def check(self) -> None:
        if not self.replaced():
            assert files(self.out) == files(self.given / "seed0")
            return
        before = files(self.work)
        checkpoint = load_checkpoint(self.out)
        load_optimizer(self.out, checkpoint.training)
        assert checkpoint.training["step"] >= self.step
        self.step = checkpoint.training["step"]
        assert files(self.work) == before

    def ended(self) -> None:
        super().ended()
        assert trained(self.out) == trained(self.given / "seed1")


class Export(Scene):
    """A whole export of a small module over another."""

    def prepare(self, nursery: Nursery) -> None:
        (self.given / "mine.py").write_text(FACTORY)
        if not (self.given / "old").exists():
            assert nursery.run(*self.export(self.given / "old", 11)).status == 0

    def export(self, out: Path, context: int) -> tuple[object, ...]:
        source = f"{self.given}/mine.py:Small"
        return ("export", source, "--context", context, "--precision", "fp32", "--out", out, "--force")

    def reset(self) -> None:
        super().reset()
        self.out = self.work / "b"
        shutil.copytree(self.given / "old", self.out)

    def command(self) -> dict[str, Any]:
        return {"arguments": self.export(self.out, 12)}

    def check(self) -> None:
        assert open_bundle(self.out, verify=True).manifest.context_length in (11, 12)

    def ended(self) -> None:
        super().ended()
        assert open_bundle(self.out, verify=True).manifest.context_length == 12


class Write(Export):
    """Only the end of an export, which writes: a bundle's files, and the exchange."""

    def prepare(self, nursery: Nursery) -> None:
        for name, context in (("old", 11), ("new", 12)):
            if not (self.given / name).exists():
                tiny = decoder.Tiny.random([(8, 8)], context_length=context)
                decoder.write_bundle(self.given / name, tiny, "fused")

    def command(self) -> dict[str, Any]:
        return {"function": "tools.torture.__main__:write_bundle", "arguments": (self.given / "new", self.out)}


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
    "session": (SavedSession, 0.15, 5),
    "bundle": (Write, 0.25, 10),
    "batch": (Batch, 0.1, 10),
    "train": (Train, 0.42, 8),
    "export": (Export, 0.08, 2),
}
