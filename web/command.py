"""`pastkey web`: writes the page that runs a bundle in a browser."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from pastkey.command import Command, say
from pastkey.contract.bundle import open_bundle
from pastkey.files.durable import whole_folder


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that pastkey export wrote")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace a folder that pastkey wrote")


def _run(arguments: argparse.Namespace) -> int:
    from .site import site, slow_on_cpu

    bundle, out = open_bundle(arguments.bundle), Path(arguments.out)
    files = site(bundle)
    with whole_folder(out, force=arguments.force) as folder:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
    if slow_on_cpu(bundle):
        say(
            "slow on a CPU, where a browser dequantizes these weights at every token. To dequantize them once, use "
            " pastkey export SOURCE --out BUNDLE --target portable"
        )
    say(f"{out}: try it with  python -m http.server -d {shlex.quote(str(out))}  at http://localhost:8000")
    return 0


web_command = Command(_add_arguments, _run)
