"""What is in a job of many rows: the rows, the answers so far, and what it was begun with."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping

from pastkey.runtime.bulk.answers import plain_error
from pastkey.runtime.bulk.job import JobRecord, read_record
from pastkey.runtime.bulk.journal import Journal
from pastkey.runtime.bulk.requests import parse_request
from pastkey.runtime.bulk.tables import open_table

from .mutations import mutate_bytes, mutate_json
from .reader import Target, json_bytes, written
from .samples import MESSAGES

_ROWS = [
    {"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}},
    {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES, "top_p": 0.5}},
]


def _rows(content: bytes) -> object:
    table, out = open_table(written("rows.jsonl", content)), io.BytesIO()
    table.write(out, lambda entry: plain_error("no"), ())
    return [parse_request(entry.content) for entry in table.entries() if isinstance(entry.content, dict)]


def _journal(content: bytes) -> object:
    with Journal(written("journal.jsonl", content)) as journal:
        return len(journal)


JOBS: Mapping[str, Target] = {
    "rows": Target(_rows, lambda: b"\n".join(json.dumps(row).encode() for row in _ROWS), mutate_json),
    "journal": Target(_journal, lambda: b'{"id":1,"answer":{}}\n{"id":"a","answer":{"error":"b"}}\n', mutate_bytes),
    "job": Target(
        lambda content: read_record(written("job.json", content)),
        json_bytes(dataclasses.asdict(JobRecord("b", "i", "1/2", {"seed": 0}, 5, False))),
        mutate_json,
    ),
}  # fmt: skip
