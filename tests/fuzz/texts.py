"""What people write: templates, conversations, corpora; and the rows of a job, with the output that it goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from pastkey.contract import names
from pastkey.export.measure.texts import encode_file
from pastkey.runtime.bulk.job import Job
from pastkey.runtime.bulk.rows import answered_line, error_of, parse_request, read_rows
from pastkey.runtime.text.chat_template import ChatTemplate, read_template
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.messages import read_messages
from pastkey.train.data.sources import open_corpus, survey
from pastkey.train.stories.__main__ import read_stories
from pastkey.train.tokenizer import train_bpe

from .bundles import bundle_folder
from .mutations import mutate_bytes, mutate_json, mutate_text
from .reader import Target, alone, json_bytes
from .samples import CORPUS, MESSAGES, TEMPLATE


def _corpus(file: Path) -> object:
    corpus = open_corpus([file])
    survey(corpus)
    return train_bpe((text for document in corpus.documents() for text in document.texts()), 260).vocab_size


def _calibration(file: Path) -> object:
    return encode_file(file, TextCodec.from_file(bundle_folder() / names.TOKENIZER))


_ROWS = [{"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}}, {"id": "x", "messages": MESSAGES}]


def _requests(file: Path) -> object:
    rows = [*read_rows(file)]
    for row in rows:
        assert json.loads(answered_line(row, error_of("no")))["id"] == row.id
    return [parse_request(row.content) for row in rows if isinstance(row.content, dict)]


def _output(out: Path) -> object:
    with out.open("ab", buffering=0) as file:
        assert isinstance(file, io.FileIO)
        job = Job(out, out, file, {1, "a"})
        job.resume()
        return job.done


TEXTS: Mapping[str, Target] = {
    "chat_template": alone(
        "t.jinja", lambda file: ChatTemplate(read_template(file)).render(MESSAGES), TEMPLATE.encode(), mutate_text
    ),
    "corpus": alone("corpus.txt", _corpus, CORPUS.encode(), mutate_text),
    "rows": alone(
        "rows.jsonl",
        lambda file: survey(open_corpus([file])).documents,
        json_bytes({"messages": MESSAGES}),
        mutate_json,
    ),
    "calibration": alone("calibration.txt", _calibration, CORPUS.encode(), mutate_text),
    "stories": alone("s.jsonl", read_stories, b'{"text": "a"}\n{"text": "b"}', mutate_json),
    "requests": alone("rows.jsonl", _requests, b"\n".join(map(json_bytes, _ROWS)), mutate_json),
    "output": alone("output.jsonl", _output, b'{"id":1,"text":"x"}\n{"id":"a","error":"b"}\n', mutate_bytes),
    "messages": alone("chat.json", read_messages, json_bytes({"messages": MESSAGES}), mutate_json),
}
