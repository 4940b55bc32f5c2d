"""What people write: templates, conversations, corpora."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

from pastkey.contract import names
from pastkey.errors import LimitWarning, UntrustedBundleError
from pastkey.export.measure.texts import encode_file
from pastkey.runtime import Limits, load
from pastkey.runtime.sandbox.model import SandboxedModel
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.messages import read_messages
from pastkey.train.data.sources import open_corpus, survey
from pastkey.train.stories import read_stories
from pastkey.train.tokenizer import train_bpe

from .bundles import bundle_folder
from .mutations import mutate_json, mutate_text
from .reader import Target, json_bytes, written
from .samples import CORPUS, MESSAGES, TEMPLATE


def _corpus(content: bytes) -> object:
    corpus = open_corpus([written("corpus.txt", content)])
    survey(corpus)
    return train_bpe((text for document in corpus.documents() for text in document.texts()), 260).vocab_size


def _rows(content: bytes) -> object:
    return survey(open_corpus([written("rows.jsonl", content)])).documents


def _template(content: bytes) -> object:
    """In the child process: a template may loop or take memory, which the process's limits end in a sentence."""
    try:
        return _sandboxed().chat_format(written("template.jinja", content)).render(MESSAGES)
    except UntrustedBundleError:
        _sandboxed.cache_clear()
        raise


@functools.cache
def _sandboxed() -> SandboxedModel:
    limits = Limits(memory=1_000_000_000, seconds=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LimitWarning)
        return load(bundle_folder(), threads=1, trust=False, limits=limits)


def _calibration(content: bytes) -> object:
    return encode_file(written("calibration.txt", content), TextCodec.from_file(bundle_folder() / names.TOKENIZER))


TEXTS: Mapping[str, Target] = {
    "chat_template": Target(_template, lambda: TEMPLATE.encode(), mutate_text),
    "corpus": Target(_corpus, lambda: CORPUS.encode(), mutate_text),
    "rows": Target(_rows, json_bytes({"messages": MESSAGES}), mutate_json),
    "calibration": Target(_calibration, lambda: CORPUS.encode(), mutate_text),
    "stories": Target(
        lambda content: read_stories(written("s.jsonl", content)), lambda: b'{"text": "a"}\n{"text": "b"}', mutate_json
    ),
    "messages": Target(
        lambda content: read_messages(written("chat.json", content)), json_bytes({"messages": MESSAGES}), mutate_json
    ),
}  # fmt: skip
