"""The sampling options of a model's authors: generation_config.json, which an export copies."""

from __future__ import annotations

from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, IntegrityError
from pastkey.files.folder import read_json

from ..options import DEFAULTS, require_valid
from ..settings import ChatOptions

_DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # used only when tokens are sampled
# Used also for greedy decoding.
ALWAYS = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
NAMES = (*_DRAWN, *ALWAYS)


def sampling_defaults(bundle: Bundle) -> ChatOptions:
    """The options in the bundle's generation_config.json; empty if the manifest does not list the file.

    As in transformers, `temperature`, `top_k`, `top_p`, `min_p` and `typical_p` need `do_sample`. Raises IntegrityError
    for a value out of range.
    """
    if names.GENERATION_CONFIG not in bundle.manifest.files:
        return {}
    found = read_json(bundle.path / names.GENERATION_CONFIG)
    drawn = found.get("do_sample") is True
    wanted: dict[str, Any] = {"temperature": 1.0} if drawn else {}
    for name in NAMES:
        if found.get(name) is not None and (drawn or name not in _DRAWN):
            wanted[name] = found[name]
    try:
        require_valid(wanted)
    except InputError as error:
        raise IntegrityError(f"{bundle.path / names.GENERATION_CONFIG} is not valid: {error}") from None
    options: ChatOptions = {}
    options.update({name: value for name, value in wanted.items() if value != DEFAULTS[name]})  # type: ignore[typeddict-item]
    return options
