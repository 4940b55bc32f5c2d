"""What the command batch takes beside a bundle, settings and a place to run: apart, so that --help is there at once."""

from __future__ import annotations

import argparse


def add_job(parser: argparse.ArgumentParser) -> None:
    """The arguments of a job."""
    add = parser.add_argument
    add("input", metavar="IN", help="rows: JSON lines, plain or OpenAI's batch requests, or a Parquet file")
    add("--out", required=True, metavar="OUT", help="the file to write, in the format of IN")
    add("--exact", action="store_true", help="one row at a time: an int8 text does not depend on the rows beside it")
    add("--template", metavar="FILE", help="a chat template (Jinja) to take in place of the bundle's own")
    add("--shard", metavar="I/N", default="", help="answer each N-th row, from the I-th on (all)")
    add("--force", action="store_true", help="begin the job anew, and replace OUT at its end")
    add("--json", action="store_true", help="print the report as one JSON object")
    parser.epilog = (
        "A job that was ended in the middle goes on by the same command. A field of a row that bears the name of a "
        "setting (max_new_tokens, temperature, ...) wins. Each row draws by a seed made of --seed (0) and its id."
    )
