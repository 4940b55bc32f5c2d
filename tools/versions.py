"""Loads and runs bundles of the newest onnxruntime here with every release from the oldest supported on.

Each release is installed with only numpy, tokenizers and the wheel of this checkout. It continues two prompts
greedily from each bundle, and its logits are compared with the newest release's. tools/aarch64.py does the same on
another architecture. Run both manually: they fetch releases from the package index.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".environments" / "versions"
BUNDLES = PLACE / "bundles"
VOCABULARY, CONTEXT, NEW_TOKENS = 96, 1280, 24
PROMPTS = (48, 1100)  # tokens
# name -> its export's precision and further flags. Older releases must refuse what they lack with a sentence: `needs`
# is fp32 that requires the newest.
EXPORTS = {"fp32": "fp32", "standard": "fp32 --graph standard", "fp16": "fp16", "int8": "int8", "int4": "int4"}
NEEDS = "needs"
REFUSED = re.compile(r"this bundle needs onnxruntime \S+ and \S+ is installed: ")
# Relative to the largest logit, as golden logits have it for a device: another release may sum in another order.
LIMITS = {"fp32": 1e-5, "standard": 1e-5, "fp16": 1e-2, "int8": 5e-2, "int4": 5e-2}


def decoder() -> Any:
    """The exported model: a decoder of two blocks with random weights, by the contract."""
    import torch

    torch.manual_seed(5)
    return runpy.run_path(str(ROOT / "examples" / "own_module.py"))["Decoder"](VOCABULARY, CONTEXT)


# --- in the environment of a release --------------------------------------------------------------------------------
def answer(bundles: Path, out: Path, prompts: Sequence[int]) -> None:
    """Runs every bundle after prompts of so many tokens. Writes the results, or the sentence that refused the bundle.

    Needs only the runtime.
    """
    import numpy as np

    import pastkey
    from pastkey.errors import PastkeyError

    answers: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for bundle in sorted(bundles.iterdir()):
        try:
            model = pastkey.load(bundle, threads=1)
            ids = []
            for count in prompts:
                prompt = [(7 * i + i * i // 3) % VOCABULARY for i in range(count)]
                ids.append(model.generate(prompt, max_new_tokens=NEW_TOKENS).ids)
                arrays[f"{bundle.name}/{count}"] = model.logits([*prompt, *ids[-1]])[-NEW_TOKENS - 1 : -1]
            answers[bundle.name] = ids
        except PastkeyError as error:
            answers[bundle.name] = str(error)
    np.savez(out, answers=np.array(json.dumps(answers)), **arrays)


# --- the driver -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """One release's results for each bundle."""

    ids: dict[str, list[list[int]] | str]  # for each prompt, or the sentence that refused the bundle
    logits: dict[str, Any]  # BUNDLE/PROMPT -> (NEW_TOKENS, V), before each new token

    @classmethod
    def of(cls, file: Path) -> Answers:
        import numpy as np

        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files if name != "answers"}
            return cls(json.loads(str(content["answers"])), arrays)


def make_bundles() -> None:
    """Exports the missing bundles."""
    BUNDLES.mkdir(parents=True, exist_ok=True)
    for name, flags in EXPORTS.items():
        source = ("export", f"{__file__}:decoder", "--context", str(CONTEXT), "--out", str(BUNDLES / name))
        if not (BUNDLES / name).exists():
            command = [sys.executable, "-m", "pastkey", *source, "--precision", *flags.split()]
            subprocess.run(command, cwd=ROOT, check=True)
    if not (BUNDLES / NEEDS).exists():
        import onnxruntime

        shutil.copytree(BUNDLES / "fp32", BUNDLES / NEEDS)
        manifest = json.loads((BUNDLES / NEEDS / "pastkey.json").read_text(encoding="utf-8"))
        manifest["min_onnxruntime"] = onnxruntime.__version__
        (BUNDLES / NEEDS / "pastkey.json").write_text(json.dumps(manifest), encoding="utf-8")


def pip(*arguments: str | Path) -> str:
    """Runs pip and returns its output."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def releases() -> list[str]:
    """Returns the releases of onnxruntime that the runtime supports and the index has, newest first."""
    from pastkey.runtime.providers.ort import OLDEST
    from pastkey.values import parse_version

    found = re.search(r"Available versions: (.+)", pip("index", "versions", "onnxruntime"))
    assert found, "pip lists no release of onnxruntime"
    return [release for release in found[1].split(", ") if parse_version(release) >= OLDEST]


def install_base() -> Path:
    """Installs numpy, tokenizers and the wheel of this checkout in a folder."""
    from .wheel import build_wheel

    base = PLACE / "base"
    shutil.rmtree(base, ignore_errors=True)
    pip("install", "--quiet", "--target", base, build_wheel(PLACE / "wheel"))
    return base


def run_release(release: str, base: Path) -> Answers:
    """Installs a release if it is missing, and runs it."""
    folder, out = PLACE / f"onnxruntime-{release}", PLACE / f"{release}.npz"
    if not (folder / "onnxruntime").exists():
        pip("install", "--quiet", "--no-deps", "--target", folder, f"onnxruntime=={release}")
    environment = os.environ | {"PYTHONPATH": f"{base}{os.pathsep}{folder}", "XDG_CACHE_HOME": str(PLACE / "cache")}
    # Without the packages of this environment, and without the other files of this folder.
    command = [sys.executable, "-S", "-P", __file__, "--answer", str(BUNDLES), str(out)]
    subprocess.run(command, cwd=PLACE, env=environment, check=True)
    return Answers.of(out)


def compared(name: str, answers: Answers, newest: Answers) -> tuple[str, bool]:
    """Compares a release's result for a bundle with the newest's. Returns it in a few words, and whether it passes.

    Greedy ids of float32 must be equal. Those of a quantized bundle may differ if the newest release's logits of the
    two tokens are nearer to each other than the limit.
    """
    import numpy as np

    found, expected = answers.ids[name], newest.ids[name]
    if isinstance(found, str):
        return "refused", name == NEEDS and bool(REFUSED.match(found))
    assert not isinstance(expected, str), expected
    limit, worst, words = LIMITS["fp32" if name == NEEDS else name], 0.0, ["equal"] * len(found)
    for number, count in enumerate(PROMPTS[: len(found)]):
        ours, theirs = answers.logits[f"{name}/{count}"], newest.logits[f"{name}/{count}"]
        first = next((n for n in range(NEW_TOKENS) if found[number][n] != expected[number][n]), NEW_TOKENS)
        scale = np.abs(theirs).max()
        worst = max(worst, float(np.abs(ours[: first + 1] - theirs[: first + 1]).max() / scale))
        if first < NEW_TOKENS:
            margin = float(theirs[first, expected[number][first]] - theirs[first, found[number][first]]) / scale
            tie = limit > LIMITS["fp32"] and abs(margin) <= limit
            words[number] = f"parts at {first} ({'near tie' if tie else 'NOT A TIE'}, {margin:.0e})"
    well = worst <= limit and not any("NOT" in word for word in words)
    return f"{', '.join(words)} ({worst:.0e}{'' if worst <= limit else ' OVER'})", well


def table(rows: Sequence[tuple[str, Answers]], newest: Answers) -> Iterator[tuple[str, bool]]:
    """Yields a line of Markdown for each release, and whether it passes."""
    names = [*EXPORTS, NEEDS]
    yield f"| onnxruntime | {' | '.join(names)} |", True
    yield f"|{'---|' * (len(names) + 1)}", True
    for release, answers in rows:
        cells = [compared(name, answers, newest) for name in names]
        yield f"| {release} | {' | '.join(words for words, _ in cells)} |", all(well for _, well in cells)


def main() -> int:
    """Returns 0 if every release passes, else 1."""
    make_bundles()
    base = install_base()
    rows = []
    for release in releases():
        print(f"onnxruntime {release}", file=sys.stderr, flush=True)
        rows.append((release, run_release(release, base)))
    lines = list(table(rows, rows[0][1]))
    print("\n".join(line for line, _ in lines))
    return 0 if all(well for _, well in lines) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(Path(sys.argv[2]), Path(sys.argv[3]), tuple(map(int, sys.argv[4:])) or PROMPTS)
    else:
        sys.exit(main())
