"""The numbers of each panel, by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from pastkey.contract.bundle import Bundle
from pastkey.export.measure.metrics import kl_by_position, log_softmax, softmax
from pastkey.precisions import PRECISIONS
from pastkey.runtime import SamplingOptions
from pastkey.runtime.text.codec import TextCodec

from .inspection import Floats, InnerValues, likeliest
from .text import EXAMPLE, SamplerStages, Text

CHANNELS = 64  # of a vector, at most
LOG2 = float(np.log(2))


class TokenTexts:
    """The texts of the tokens that a page names, each once."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._places: dict[int, int] = {}

    def place(self, token: int) -> int:
        """The token's place in `texts`."""
        return self._places.setdefault(int(token), len(self._places))

    def places(self, tokens: Any) -> np.ndarray:
        """The places of an array of tokens."""
        return np.array([self.place(token) for token in np.ravel(tokens)], np.int32).reshape(np.shape(tokens))

    @property
    def texts(self) -> list[str]:
        """The tokens' texts; their numbers without a tokenizer."""
        return [self._text(token) for token in self._places]

    def _text(self, token: int) -> str:
        if self._codec is None:
            return str(token)
        text = self._codec.written(token).decode("utf-8", "backslashreplace")  # part of a character is \xe2
        return visible(text) or f"[{token}]"


def visible(text: str) -> str:
    """A token's text with signs for invisible characters: control characters, and spaces at its ends."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(f"U+{ord(one):04X}" if unicodedata.category(one)[0] == "C" else one for one in text)
    return text if text == text.strip() else text.replace(" ", "␣")


def panels(
    bundle: Bundle,
    codec: TextCodec | None,
    text: Text,
    seen: InnerValues,
    settings: SamplingOptions,
    stages: Sequence[SamplerStages],
    reference: tuple[str, Floats] | None,
) -> dict[str, Any]:
    """Returns every panel's numbers. W tokens are shown; arrays are float32, or int32 places in `vocabulary`.

    Args:
        bundle: The bundle.
        codec: Its tokenizer.
        text: Prompt and output, S tokens.
        seen: The values inside the bundle.
        settings: The sampler's, which are EXAMPLE for a greedy text.
        stages: The sampler's stages at each shown position.
        reference: Another model's name and its logits (W, V).
    """
    words, ids = TokenTexts(codec), [*text.ids, text.following]
    following = np.array(ids[seen.first + 1 :])
    bits = -np.take_along_axis(log_softmax(seen.logits), following[:, None], -1)[:, 0] / LOG2
    top, manifest = likeliest(seen.logits), bundle.manifest
    found: dict[str, Any] = {
        "model": {
            "source": manifest.source, "precision": manifest.precision, "calls": seen.layers, "heads": seen.heads,
            "tokens": manifest.vocab_size, "context": manifest.context_length,
        },
        "text": {
            "ids": words.places(ids[seen.first :]), "first": seen.first, "prompt": text.prompt_tokens,
            "ended": text.ended, "surprise": bits.astype(np.float32), "at": max(0, text.prompt_tokens - 1 - seen.first),
        },
        "embedding": _embedding(seen),
        "attention": _attention(seen),
        "layers": {
            "error": seen.lens_error,
            "at": [
                None if lens is None else {"ids": words.places(lens.ids), "p": lens.probabilities, "next": chance}
                for lens, chance in zip(seen.lens, seen.lens_next, strict=True)
            ],
        },
        "next": {"ids": words.places(top.ids), "p": top.probabilities},
        "cache": {"bytes": _cache_bytes(bundle)},
        "sampler": {
            "settings": {name: value for name, value in settings.items() if name != "seed"},
            "example": settings is EXAMPLE,
            "at": [
                {"names": s.names, "kept": s.kept, "ids": words.places(s.ids), "p": s.probabilities} for s in stages
            ],
        },
    }  # fmt: skip
    if reference is not None:
        name, logits = reference
        kl = kl_by_position(logits, softmax(logits), seen.logits)
        p = np.take_along_axis(softmax(logits), top.ids, -1)
        found["reference"] = {"name": name, "kl": kl.astype(np.float32), "p": p.astype(np.float32)}
    return found | {"vocabulary": words.texts}


def _embedding(seen: InnerValues) -> dict[str, Any] | None:
    """The vectors (W, C), only the first channels of many."""
    if seen.entering is None:
        return None
    parts = {"word": seen.embedding, "position": seen.positions, "sum": seen.entering}
    if seen.positions is None or seen.embedding is None:
        parts = {"sum": seen.entering}
    shown = {name: rows[:, :CHANNELS] for name, rows in parts.items() if rows is not None}
    return {"parts": shown, "channels": seen.entering.shape[1]}


def _attention(seen: InnerValues) -> dict[str, Any]:
    """Weights (calls, H, W, W), or with one more first column, the sum of the weights of tokens that are not shown."""
    found = []
    for weights in seen.attention.values():
        earlier = weights[:, :, : seen.first].sum(-1, keepdims=True)
        shown = weights[:, :, seen.first :]
        found.append(np.concatenate([earlier, shown], -1) if seen.first else shown)
    return {
        "calls": list(seen.attention), "heads": seen.attention_heads, "weights": np.stack(found),
        "error": max(seen.errors.values()), "sums": float(min(weights.sum(-1).min() for weights in found)),
    }  # fmt: skip


def _cache_bytes(bundle: Bundle) -> int:
    """The bytes of one token's keys and values."""
    numbers = sum(g.kv_heads * (g.key_head_size + g.value_head_size) for g in bundle.manifest.layers)
    return numbers * PRECISIONS[bundle.manifest.precision].cache_bytes
