"""The reference of all commands, between the markers of docs/cli.md, of their own parsers: python -m tools.commands"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pastkey.__main__ import GROUPS
from pastkey.command import Parser

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def put(page: Path, name: str, content: str) -> str:
    """Returns the text of a page with this content between its markers of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    text, count = re.subn(pattern, lambda m: m[1] + content + m[2], page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert count == 1, f"{page.name} has no markers of {name}"
    return text


def parser_of(name: str, module: str) -> Parser:
    """Returns the parser of a command."""
    parser = Parser(prog=f"pastkey {name}")
    getattr(importlib.import_module(f"pastkey.{module}"), f"{name}_command").add_arguments(parser)
    return parser


def reference() -> str:
    """Returns a section for each command: its usage, an example, and a table for each group of options."""
    return "\n".join(line for group in GROUPS.values() for name, row in group.items() for line in _section(name, *row))


def _section(name: str, module: str, summary: str, example: str) -> Iterator[str]:
    parser = parser_of(name, module)
    usage = re.match(r"usage: (.*?)\n\n", parser.format_help(), re.DOTALL)
    assert usage
    yield f"\n## pastkey {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n```sh\n{' '.join(usage[1].split())}\n```\n"
    yield f"For example: `pastkey {example}`\n\n| option | meaning | default |\n|---|---|---|"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions and group.title not in ("positional arguments", "options"):
            yield f"| **{group.title}** | | |"
        yield from map(_row, actions)
    if parser.epilog:
        yield f"\n{_cell(parser.epilog)}"
    yield ""


def _row(action: argparse.Action) -> str:
    told, _, default = (action.help or "").partition(" (default: ")
    known = action.default not in (None, argparse.SUPPRESS, "", []) and action.nargs != 0
    default = default.removesuffix(")") or (f"`{action.default}`" if known else "")
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    value = value[0] if isinstance(value, tuple) else value
    value = value and value.replace("|", " or ")  # which would end the cell
    shown = names if action.nargs == 0 else f"{names} `{value}`".strip()
    return f"| {shown} | {_cell(told)} | {_cell(default)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Returns the exit status."""
    PAGE.write_text(put(PAGE, "commands", reference() + "\n"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
