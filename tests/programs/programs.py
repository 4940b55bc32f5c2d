"""The other programs: each continues prompts greedily from a bundle's folder, in a separate environment."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import environment

from ..shared import ran
from ..web.browser import visit
from .environments import GENAI, OPTIMUM, had, install_chromium, node_environment

_HERE = Path(__file__).parent
_OFFLINE = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Answer:
    """The output of a program for a prompt."""

    prompt_ids: list[int]  # as it tokenizes the prompt
    ids: list[int]  # the new tokens; some programs give the EOS token too


def onnxruntime(bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """Only onnxruntime, in a loop."""
    return _answers([sys.executable, _HERE / "greedy_onnxruntime.py", bundle, new_tokens, *prompts])


def genai(bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """onnxruntime-genai."""
    return _answers([environment(*GENAI), _HERE / "greedy_genai.py", bundle, new_tokens, *prompts])


def optimum(bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """optimum's ORTModelForCausalLM with transformers 4.57."""
    return _answers([environment(*OPTIMUM), _HERE / "greedy_optimum.py", bundle, new_tokens, *prompts])


def node(bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """transformers.js in Node."""
    folder = node_environment(_HERE / "package.json")
    for name in ("greedy.mjs", "greedy_node.mjs"):  # Node looks for packages in the script's folder
        shutil.copy(_HERE / name, folder)
    return _answers(["node", folder / "greedy_node.mjs", bundle, new_tokens, *prompts])


def browser(bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """transformers.js in headless Chromium."""
    packages = node_environment(_HERE / "package.json") / "node_modules"
    chromium = had(install_chromium(), "chromium is")
    request = bundle.parent / f"{bundle.name}-request.json"
    request.write_text(json.dumps({"newTokens": new_tokens, "prompts": list(prompts)}))
    files: dict[str, Path | bytes] = {name: _HERE / name for name in ("page.html", "greedy.mjs")}
    files |= {"request.json": request, "node_modules": packages, "bundle": bundle}
    path, content = visit(chromium, "page.html", files)
    assert path == "/answers", content
    return [Answer(answer["prompt_ids"], answer["ids"]) for answer in content]


PROGRAMS = {program.__name__: program for program in (onnxruntime, genai, optimum, node, browser)}


def _answers(command: Sequence[str | Path | int]) -> list[Answer]:
    answers = [json.loads(line) for line in ran(*command, env=os.environ | _OFFLINE).stdout.splitlines()]
    return [Answer(answer["prompt_ids"], answer["ids"]) for answer in answers]
