"""What is in a job of many rows: the rows, and the output that it goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

from pastkey.runtime.bulk.job import Job
from pastkey.runtime.bulk.rows import answered_line, error_of, parse_request, read_rows

from .mutations import mutate_bytes, mutate_json
from .reader import Target, written
from .samples import MESSAGES

_ROWS = [{"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}}, {"id": "x", "messages": MESSAGES}]


def _rows(content: bytes) -> object:
    rows = [*read_rows(written("rows.jsonl", content))]
    for row in rows:
        assert json.loads(answered_line(row, error_of("no")))["id"] == row.id
    return [parse_request(row.content) for row in rows if isinstance(row.content, dict)]


def _output(content: bytes) -> object:
    out = written("output.jsonl", content)
    with out.open("ab", buffering=0) as file:
        assert isinstance(file, io.FileIO)
        job = Job(out, out, file, {1, "a"})
        job.resume()
        return job.done


JOBS: Mapping[str, Target] = {
    "rows": Target(_rows, lambda: b"\n".join(json.dumps(row).encode() for row in _ROWS), mutate_json),
    "output": Target(_output, lambda: b'{"id":1,"text":"x"}\n{"id":"a","error":"b"}\n', mutate_bytes),
}  # fmt: skip
