"""`pastkey train`: parses and runs. TrainConfig documents the settings and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import typing
from pathlib import Path
from typing import Any

from pastkey.command import Command, finite_float, positive_int, print_json, say, whole_int

from .settings import TrainConfig

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


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

    parser.add_argument(
        "--processes", type=positive_int, metavar="N", help="processes on this machine; for several: torchrun"
    )
    kinds = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add(groups[group], field, kinds[name])


def _add(group: Any, field: Any, kind: Any) -> None:
    """Adds the flag of a setting. It stays unset unless it is given, so that the preset's value applies."""
    flag, told = "--" + field.name.replace("_", "-"), field.metadata["help"]
    own = next((part for part in typing.get_args(kind) if part in (bool, int, float)), kind)  # without None
    if own is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=told)
        return
    read, default = {int: whole_int, float: finite_float}.get(own, str), field.default
    told += f" (default: {default})" if default is not None else ""
    group.add_argument(flag, type=read, default=argparse.SUPPRESS, metavar=field.metadata["metavar"], help=told)


def _run(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in _FIELDS}
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
            say(f"{arguments.out} keeps the last checkpoint: --resume continues from it")
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
