"""`pastkey train`: parses and runs. TrainConfig documents the settings and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from pastkey.command import Command, finite_float, natural_int, positive_int, print_json, say

from .settings import PRESETS, TrainConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT", help="the folder to write")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="text, JSON lines and Parquet files, or folders of them, with their shares of the batches (default: "
        "built-in stories, or the classic lesson)",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in CHECKPOINT")
    start.add_argument("--force", action="store_true", help="replace CHECKPOINT")
    parser.add_argument("--json", action="store_true", help="print the final figures as one JSON object")

    model = parser.add_argument_group("the decoder (default: the preset's sizes)")
    kinds = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    _add(model, "preset", str, f"{kinds}", metavar="NAME")
    _add(model, "context", positive_int, "context length in tokens")
    _add(model, "hidden_size", positive_int, "width of the residual stream")
    _add(model, "layers", positive_int, "attention layers")
    _add(model, "heads", positive_int, "query heads")
    _add(model, "kv_heads", positive_int, "key and value heads, a divisor of the query heads")
    _add(model, "head_dim", positive_int, "size of a head")
    _add(model, "tokenizer", str, "bpe, char, word, or the path of a tokenizer.json", metavar="KIND")
    _add(model, "vocab_size", positive_int, "largest number of tokens, for bpe and word")

    training = parser.add_argument_group("training")
    _add(training, "steps", positive_int, "optimizer steps")
    _add(training, "batch_size", positive_int, "windows of text per forward pass")
    _add(training, "accumulate", positive_int, "forward passes per step")
    _add(training, "learning_rate", finite_float, "peak learning rate, after the warm-up", metavar="X")
    _add(training, "warmup_steps", natural_int, "steps until the peak learning rate")
    _add(training, "weight_decay", finite_float, "weight decay of AdamW, on projections only", metavar="X")
    _add(training, "save_every", positive_int, "steps between checkpoints")
    _add(training, "seed", natural_int, "seed of weights, batches and stories")
    _add(training, "threads", positive_int, "threads of torch")


def _add(group: Any, name: str, kind: Any, text: str, metavar: str = "N") -> None:
    """Adds an option for a TrainConfig field. It stays unset unless it is given, so that the preset's value applies."""
    default = f" (default {_DEFAULTS[name]})" if _DEFAULTS[name] is not None else ""
    option = "--" + name.replace("_", "-")
    group.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text + default)


def _run(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in _DEFAULTS}
    config = TrainConfig.from_given(given)  # validate before torch loads

    from . import loop

    try:
        if arguments.resume:
            figures = loop.resume(arguments.out, given, data=arguments.data)
        else:
            figures = loop.train(config, arguments.out, data=arguments.data, force=arguments.force)
    except KeyboardInterrupt:
        if arguments.out.exists():
            say(f"{arguments.out} keeps the last checkpoint: --resume goes on from it")
        raise
    if arguments.json:
        print_json(figures)
    else:
        say(
            f"trained {figures['parameters']:,} parameters for {figures['step']} steps in {figures['seconds']} s; "
            f"next: pastkey export {shlex.quote(str(arguments.out))} --out BUNDLE"
        )
    return 0


train_command = Command(_add_arguments, _run)
