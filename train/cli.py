"""`pastkey train`: parses and runs. TrainConfig documents the settings and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from pastkey.command import Command, finite_float, natural_int, positive_int, print_json, say

from .settings import DEVICES, PRECISIONS, PRESETS, TrainConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
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

    init = parser.add_argument_group("a model that exists, in the place of a new one")
    _add(init, "init", str, "a checkpoint, a Hugging Face folder or a GGUF file to fine-tune", metavar="MODEL")
    _flag(init, "lora", "train a LoRA adapter, which `export` merges, and not all weights")
    _add(init, "lora_rank", positive_int, "rank of the adapter")

    model = parser.add_argument_group("the decoder (default: the preset's sizes)")
    kinds = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    _add(model, "preset", str, f"{kinds}", metavar="NAME")
    _add(model, "context", positive_int, "context length in tokens")
    _add(model, "hidden_size", positive_int, "width of the residual stream")
    _add(model, "layers", positive_int, "attention layers")
    _add(model, "heads", positive_int, "query heads")
    _add(model, "kv_heads", positive_int, "key and value heads, a divisor of the query heads")
    _add(model, "head_dim", positive_int, "size of a head")
    _add(model, "rope_scaling", str, "linear, dynamic, yarn or llama3, for a longer context", metavar="KIND")
    _add(model, "rope_factor", finite_float, "how much longer the context gets", metavar="X")
    _add(model, "original_context", positive_int, "context before scaling, for yarn and llama3 (default context / X)")
    _add(model, "tokenizer", str, "bpe, char, word, or the path of a tokenizer.json", metavar="KIND")
    _add(model, "vocab_size", positive_int, "largest number of tokens, for bpe and word")

    training = parser.add_argument_group("training")
    _add(training, "steps", positive_int, "optimizer steps")
    _add(training, "minutes", finite_float, "plan as many steps as this time allows", metavar="X")
    _add(training, "batch_size", positive_int, "windows of text per batch")
    _add(training, "accumulate", positive_int, "batches per step")
    kinds = "muon for the matrices of projections and adamw for all else, or adamw for all"
    _add(training, "optimizer", str, kinds, metavar="NAME")
    _add(training, "learning_rate", finite_float, "peak learning rate, after the warm-up", metavar="X")
    _add(training, "warmup_steps", natural_int, "steps until the peak learning rate, at most a quarter of all")
    _add(training, "weight_decay", finite_float, "weight decay of AdamW, on projections only", metavar="X")
    _add(training, "save_every", positive_int, "steps between checkpoints")
    _add(training, "seed", natural_int, "seed of weights, batches and stories")
    _add(training, "threads", positive_int, "threads of torch")
    _flag(training, "gradient_checkpointing", "less memory, a third slower")

    hardware = parser.add_argument_group("hardware")
    hardware.add_argument(
        "--processes", type=positive_int, metavar="N", help="processes on this machine; for several: torchrun"
    )
    _add(hardware, "device", str, ", ".join(DEVICES), metavar="NAME")
    _add(hardware, "precision", str, "of matrix products: " + ", ".join(PRECISIONS), metavar="NAME")
    _add(hardware, "peak_tflops", finite_float, "peak of one device in 10^12 operations per second", metavar="X")
    for name, text in (
        ("compile", "compile the layers by torch.compile (default: on CUDA)"),
        ("shard", "divide the model among the processes (FSDP2)"),
    ):
        flag = argparse.BooleanOptionalAction
        hardware.add_argument("--" + name, action=flag, default=argparse.SUPPRESS, help=text)


def _add(group: Any, name: str, kind: Any, text: str, metavar: str = "N") -> None:
    """Adds an option for a TrainConfig field. It stays unset unless it is given, so that the preset's value applies."""
    default = f" (default {_DEFAULTS[name]})" if _DEFAULTS[name] is not None else ""
    option = "--" + name.replace("_", "-")
    group.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text + default)


def _flag(group: Any, name: str, text: str) -> None:
    group.add_argument("--" + name.replace("_", "-"), action="store_true", default=argparse.SUPPRESS, help=text)


def _run(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in _DEFAULTS}
    config = TrainConfig.from_given(given)  # validate before torch loads
    if arguments.processes is not None and "WORLD_SIZE" not in os.environ:  # those that it starts have the same flags
        from .hardware.launch import launch

        return launch(arguments.processes, ["train", *arguments.parser.given])

    if "WORLD_SIZE" in os.environ:  # torch warns of each process that is gone, with a trace of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from . import loop
    from .hardware.device import keep_freed_memory

    keep_freed_memory()
    try:
        if arguments.resume:
            figures = loop.resume(arguments.out, given, data=arguments.data)
        else:
            figures = loop.train(config, arguments.out, data=arguments.data, force=arguments.force)
    except KeyboardInterrupt:
        if arguments.out.exists():
            say(f"{arguments.out} keeps the last checkpoint: --resume goes on from it")
        raise
    if not figures:  # another process than the first
        return 0
    if arguments.json:
        print_json(figures)
    else:
        say(
            f"trained {figures['parameters']:,} parameters for {figures['step']} steps in {figures['seconds']} s; "
            f"next: pastkey export {shlex.quote(str(arguments.out))} --out BUNDLE"
        )
    return 0


train_command = Command(_add_arguments, _run)
