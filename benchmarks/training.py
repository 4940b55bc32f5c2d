"""Training compared with nanoGPT's recipe for a CPU, the program that people begin with."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import WORK, Answer, BenchmarkError, Table
from benchmarks.store import Store, digest_of_files
from pastkey.files.folder import read_text

_ARMS = ("nanoGPT", "pastkey train")
# The command of nanoGPT's README for a CPU, which holds out the last tenth of the text.
_RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--always_save_checkpoint=True"
)
# Its own estimate is of a few windows at random; this is the loss over all that is held out, in nats per character.
_HELD_OUT = """
import sys, numpy, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1], weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(numpy.fromfile(sys.argv[2], "<u2").astype("int64"))
whole, nats = (len(ids) - 1) // 64, 0.0
with torch.no_grad():
    for first in range(0, whole, 64):
        starts = torch.arange(first, min(first + 64, whole))[:, None] * 64 + torch.arange(64)
        nats += model(ids[starts], ids[starts + 1])[1].item() * starts.numel()
print(nats / (whole * 64))
"""


def training(nanogpt: Path, texts: Sequence[Path], *, threads: int = 2, rounds: int = 1, work: Path = WORK) -> Answer:
    """Arms: nanoGPT, a checkout of which is given, and `pastkey train --minutes` for as long. Metric: bits per byte.

    Both train on the first nine tenths of each text and are judged on the last tenth, of which ours uses 200,000
    characters at most.
    """
    store = Store(work)
    rows: list[list[str]] = []
    curves: list[list[str]] = []
    for text in texts:
        for number in range(rounds):
            key = [digest_of_files(text), threads, number]
            race = partial(_race, nanogpt, text, threads, store)
            made = store.once(f"training-{text.stem}-{number}", race, key=key)
            rows.append([text.name, *(f"{made[arm]['seconds']:.0f}, {made[arm]['bits']:.3f}" for arm in _ARMS)])
            if number == 0:
                curves += [
                    [arm, text.name, f"{at:.0f}", f"{bits:.3f}"] for arm in _ARMS for at, bits in made[arm]["curve"]
                ]
    yield Table("Seconds, and bits per byte of the held-out tenth:", ["text", *_ARMS], rows)
    yield Table("On the way, in the first round:", ["trained by", "text", "seconds", "bits per byte"], curves)


def _race(nanogpt: Path, text: Path, threads: int, store: Store) -> dict[str, Any]:
    theirs = _nanogpt(nanogpt, text, threads, store)
    return {_ARMS[0]: theirs, _ARMS[1]: _pastkey(text, threads, theirs["seconds"] / 60, store)}


def _nanogpt(folder: Path, text: Path, threads: int, store: Store) -> dict[str, Any]:
    folder, content = folder.resolve(), read_text(text)
    cut, characters = int(len(content) * 0.9), sorted(set(content))
    data, out = folder / "data" / "pastkey_race", store.models / "nanogpt"
    data.mkdir(parents=True, exist_ok=True)
    numbers = {character: number for number, character in enumerate(characters)}
    for name, part in (("train", content[:cut]), ("val", content[cut:])):
        (data / f"{name}.bin").write_bytes(array("H", [numbers[character] for character in part]).tobytes())
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    command = [sys.executable, "train.py", *_RECIPE.split(), f"--out_dir={out}", "--dataset=pastkey_race"]
    lines, seconds = _timed(command, folder, threads, store.logs / "nanogpt.log")
    asked = [sys.executable, "-c", _HELD_OUT, str(out / "ckpt.pt"), str(data / "val.bin")]
    done = subprocess.run(asked, cwd=folder, check=True, capture_output=True, text=True)
    per_byte = (len(content) - cut) / len(content[cut:].encode()) / math.log(2)
    curve = [(at, float(found[1]) * per_byte) for at, line in lines if (found := re.search(r"val loss ([\d.]+)", line))]
    return {"seconds": seconds, "bits": float(done.stdout.split()[-1]) * per_byte, "curve": curve}


def _pastkey(text: Path, threads: int, minutes: float, store: Store) -> dict[str, Any]:
    out = store.models / "race"
    command = [sys.executable, "-m", "pastkey", "train", "--out", str(out), "--data", str(text.resolve()), "--force"]
    command += ["--minutes", f"{minutes:.3f}", "--threads", str(threads)]
    lines, seconds = _timed(command, Path.cwd(), threads, store.logs / "race.log")
    curve = [(at, float(found[1])) for at, line in lines if (found := re.search(r"([\d.]+) bits per byte", line))]
    return {"seconds": seconds, "bits": curve[-1][1], "curve": curve}


def _timed(command: Sequence[str], folder: Path, threads: int, log: Path) -> tuple[list[tuple[float, str]], float]:
    """The lines that a program prints with their seconds, and how long it ran, imports and all."""
    began, lines = time.monotonic(), []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - began, line))
            file.write(line)
    if process.returncode:
        raise BenchmarkError(f"{command[1]} {command[2]} ended with status {process.returncode}: see {log}")
    return lines, time.monotonic() - began
