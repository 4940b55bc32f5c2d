"""The built-in stories: tells some, or checks those of a file.

python -m pastkey.train.stories --count 3            tells three stories
python -m pastkey.train.stories --check FILE         the share of a file's stories that the grammar accepts
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from pastkey.command import natural_int, print_json
from pastkey.errors import InputError, PastkeyError
from pastkey.files.folder import read_text
from pastkey.values import is_unicode

from . import acceptance, check_story, stories


def read_stories(path: Path) -> list[str]:
    """Returns a file's stories: JSON lines with a "text" each, or paragraphs separated by blank or end-token lines."""
    content = read_text(path)
    if content.lstrip().startswith("{"):
        try:
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
            if not all(isinstance(text, str) and is_unicode(text) for text in texts):
                raise ValueError("a text is none")
            return texts
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} does not hold one JSON object with a text per line: {error}") from None
    blocks = re.split(r"\n\s*\n|<\|endoftext\|>", content)
    return [" ".join(block.splitlines()).strip() for block in blocks if block.strip()]


def main() -> int:
    """Tells stories, or prints how many of a file's the grammar accepts. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pastkey.train.stories", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="print the share of its stories that are accepted")
    parser.add_argument("--count", type=natural_int, default=1, help="stories to tell (default 1)")
    parser.add_argument("--seed", type=natural_int, default=0, help="other stories for another seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the figures")
    arguments = parser.parse_args()
    if arguments.check is None:
        for _, story in zip(range(arguments.count), stories(arguments.seed), strict=False):
            print(story + "\n")
        return 0
    try:
        texts = read_stories(arguments.check)
        share = acceptance(texts)
    except PastkeyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print_json({"stories": len(texts), "accepted_share": share})
    else:
        print(f"the grammar accepts {share:.1%} of {len(texts)} stories")
        reasons = [verdict.reason for text in texts if not (verdict := check_story(text)).ok]
        for reason in reasons[:5]:
            print(f"  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
