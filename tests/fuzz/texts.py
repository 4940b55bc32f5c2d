"""What people write: templates, conversations, corpora; and the rows of a job, with the output that it goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

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
from .reader import Target, json_bytes, written
from .samples import CORPUS, MESSAGES, TEMPLATE


def _corpus(content: bytes) -> object:
    corpus = open_corpus([written("corpus.txt", content)])
    survey(corpus)
    return train_bpe((text for document in corpus.documents() for text in document.texts()), 260).vocab_size


def _rows(content: bytes) -> object:
    return survey(open_corpus([written("rows.jsonl", content)])).documents


def _template(content: bytes) -> object:
    return ChatTemplate(read_template(written("template.jinja", content))).render(MESSAGES)


def _calibration(content: bytes) -> object:
    return encode_file(written("calibration.txt", content), TextCodec.from_file(bundle_folder() / names.TOKENIZER))


_ROWS = [{"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}}, {"id": "x", "messages": MESSAGES}]


def _requests(content: bytes) -> object:
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


TEXTS: Mapping[str, Target] = {
    "chat_template": Target(_template, lambda: TEMPLATE.encode(), mutate_text, native=True),
    "corpus": Target(_corpus, lambda: CORPUS.encode(), mutate_text),
    "rows": Target(_rows, json_bytes({"messages": MESSAGES}), mutate_json),
    "calibration": Target(_calibration, lambda: CORPUS.encode(), mutate_text),
    "stories": Target(
        lambda content: read_stories(written("s.jsonl", content)), lambda: b'{"text": "a"}\n{"text": "b"}', mutate_json
    ),
    "requests": Target(_requests, lambda: b"\n".join(json.dumps(row).encode() for row in _ROWS), mutate_json),
    "output": Target(_output, lambda: b'{"id":1,"text":"x"}\n{"id":"a","error":"b"}\n', mutate_bytes),
    "messages": Target(
        lambda content: read_messages(written("chat.json", content)), json_bytes({"messages": MESSAGES}), mutate_json
    ),
}  # fmt: skip
