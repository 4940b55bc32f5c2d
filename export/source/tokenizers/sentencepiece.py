"""A SentencePiece .model -> tokenizer.json, for models of the types BPE, unigram and character.

The file is one protobuf message, ModelProto: every piece with its score and kind, the training settings, and the
normalization of a text. This module parses the wire format itself. If the package `sentencepiece` is installed, its
results on sample texts are compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pastkey.errors import InputError, first_line
from pastkey.files.protobuf import BYTES, VARINT, fields, varint
from pastkey.files.reading import read_bytes
from pastkey.files.tokenizer_file import MOST_BYTES

from .conversion import Conversion

_LONGEST_PIECE = 4000  # bytes: the conversion cuts a piece in all places
SPACE = "▁"  # SentencePiece's character for a space inside a piece

# Kinds of pieces, and types of models, by their numbers in the format.
NORMAL, UNKNOWN, CONTROL, _USER_DEFINED, _UNUSED, BYTE = range(1, 7)
_UNIGRAM, BPE, _WORD, _CHARACTER = range(1, 5)
_STAND_IN = 0xF0000  # the first of the private characters that replace user-defined pieces while a text is normalized

Value = int | bytes  # of a field: a varint's or fixed number's bits, or the bytes


@dataclass(frozen=True)
class Piece:
    """One token."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a .model."""

    pieces: tuple[Piece, ...]
    trainer: Mapping[int, Value]  # TrainerSpec, by field number
    normalizer: Mapping[int, Value]  # NormalizerSpec

    @property
    def type(self) -> Value:
        return self.trainer.get(3, _UNIGRAM)

    def special(self, field: int, default: int) -> int | None:
        """Returns the id in the trainer's field, None if it is -1."""
        value = self.trainer.get(field, default)
        return value if isinstance(value, int) and 0 <= value < len(self.pieces) else None

    def normalizes(self, field: int) -> bool:
        """Returns a flag of the normalizer; each is on by default."""
        return bool(self.normalizer.get(field, 1))

    def of(self, kind: int) -> list[str]:
        return [piece.text for piece in self.pieces if piece.kind == kind]


def from_sentencepiece(file: Path) -> Conversion:
    """Converts a .model. Raises InputError if it is not one, or tokenizer.json cannot express it."""
    model = read_model(file)
    _refuse_unlike(model, file)
    tokenizer = tokenizer_of(model)
    unknown = next((number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    hidden = frozenset() if unknown is None else frozenset({unknown})
    bos, eos = model.special(41, 1), model.special(42, 2)
    if importlib.util.find_spec("sentencepiece") is None:
        told = (
            f"{file} was made a tokenizer.json and not compared with the original, for which the package sentencepiece "
            "is needed: type  pip install sentencepiece  and export again"
        )
        return Conversion(tokenizer, bos=bos, eos=eos, warnings=(told,))
    try:
        original: Any = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file} is not a SentencePiece model, says sentencepiece: {first_line(error)}") from None
    return Conversion(tokenizer, original.encode, original.decode, not_decoded=hidden, bos=bos, eos=eos)


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that makes a piece, the highest score first.

    SentencePiece's BPE always makes the piece of the highest score. The tokenizers library needs a list of merges in
    order of preference.
    """
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


# --- the tokenizer ------------------------------------------------------------------------------------------------
def _refuse_unlike(model: SentencePieceModel, file: Path) -> None:
    reason = None
    if model.type not in (_UNIGRAM, BPE, _CHARACTER):
        reason = "a model of whole words"
    elif model.trainer.get(24, 0):
        reason = "spaces as the end of a word (treat_whitespace_as_suffix)"
    elif not model.normalizes(5):
        reason = "spaces that it does not escape"
    elif model.of(_UNUSED):
        reason = f"pieces that are not used ({model.of(_UNUSED)[0]!r})"
    if reason is not None:
        raise InputError(f"{file} has {reason}, which pastkey cannot convert: give your own tokenizer.json")


def tokenizer_of(model: SentencePieceModel) -> Tokenizer:
    """Returns the tokenizer of a model, without the tokens around a text."""
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    (unknown,) = model.of(UNKNOWN)
    bytes_too, user_defined = bool(model.of(BYTE)), sorted(model.of(_USER_DEFINED), key=len, reverse=True)
    kind: models.Model
    if model.type == _UNIGRAM:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        kind = models.Unigram(scored, vocabulary[unknown], byte_fallback=bytes_too)
    else:
        scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
        merges = merges_by_score(scores) if model.type == BPE else []
        kind = models.BPE(
            vocabulary,
            merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bytes_too,
            ignore_merges=bool(user_defined),  # a user-defined piece is whole, and no merge makes it
        )
    tokenizer = Tokenizer(kind)
    tokenizer.normalizer = _normalizer(model, user_defined)
    if user_defined:
        either = "|".join(map(_escaped, user_defined))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(either), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizes(3) or model.normalizes(4):
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    specials = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


def _normalizer(model: SentencePieceModel, user_defined: list[str]) -> normalizers.Normalizer:
    steps: list[Any] = []
    charsmap = model.normalizer.get(2, b"")
    if isinstance(charsmap, bytes) and charsmap:
        mapped = normalizers.Precompiled(charsmap)
        # Precompiled treats "\r\n" as one character and would drop the second.
        steps += [normalizers.Replace("\r", mapped.normalize_str("\r")), mapped]
    if model.normalizes(4):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    alone = normalizers.Sequence(list(steps))
    changed = [text for text in user_defined if alone.normalize_str(text) != text]  # a line break becomes a space
    stand_ins = [(text, chr(_STAND_IN + number)) for number, text in enumerate(changed)]
    steps = [normalizers.Replace(text, stand_in) for text, stand_in in stand_ins] + steps
    steps += [normalizers.Replace(stand_in, text) for text, stand_in in stand_ins]
    if model.normalizes(3):  # add_dummy_prefix
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _escaped(text: str) -> str:
    """Returns a text as a regular expression of the tokenizers library."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


# --- the file -----------------------------------------------------------------------------------------------------
def read_model(file: Path) -> SentencePieceModel:
    """Reads a file. Raises InputError unless it is a ModelProto with one unknown piece and each piece once."""
    content = read_bytes(file, MOST_BYTES)
    pieces, trainer, normalizer = [], dict[int, Value](), dict[int, Value]()
    try:
        for number, value in _fields(content):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer |= dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer |= dict(_fields(value))
    except (ValueError, IndexError, struct.error):  # IndexError: past the end
        raise InputError(f"{file} is not a SentencePiece model, or was cut short: copy it again") from None
    if [piece.kind for piece in pieces].count(UNKNOWN) != 1 or len({piece.text for piece in pieces}) != len(pieces):
        raise InputError(
            f"{file} is not a SentencePiece model: its {len(pieces)} pieces are not one unknown and others, each once"
        )
    return SentencePieceModel(tuple(pieces), trainer, normalizer)


def _piece(content: bytes) -> Piece:
    found = dict(_fields(content))
    text, score, kind = found.get(1, b""), found.get(2, 0), found.get(3, NORMAL)
    if not isinstance(text, bytes) or isinstance(score, bytes) or isinstance(kind, bytes):
        raise ValueError("a piece of other types")
    if len(text) > _LONGEST_PIECE:
        raise ValueError("a piece of impossible length")
    return Piece(text.decode(), struct.unpack("<f", struct.pack("<I", score))[0], kind)


def _fields(content: bytes) -> Iterator[tuple[int, Value]]:
    """Yields number and value of each field of a message, in order. Negative varints become negative numbers."""
    for number, wire, start, end in fields(content, 0, len(content)):
        if wire == VARINT:
            value, _ = varint(content, start)
            yield number, value - (1 << 64) if value >> 63 else value
        else:
            yield number, content[start:end] if wire == BYTES else int.from_bytes(content[start:end], "little")
