"""Tokenizers: byte-level BPE, words, characters, and the classic lesson's five words.

Tokens around a prompt come only from the post-processor in tokenizer.json, so that
`Tokenizer.from_file(path).encode(text).ids` is the whole prompt.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pastkey.command import say
from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError
from pastkey.files.folder import read_json, read_text
from pastkey.files.reading import panics_as_errors, read_bytes, reading
from pastkey.files.tokenizer_file import MOST_BYTES, open_tokenizer, require_dense

END_OF_TEXT: Final = "<|endoftext|>"  # begins every document and so ends the one before it, as in GPT-2's corpus
UNKNOWN: Final = "<unk>"
LESSON_END: Final = "<EOS>"
LESSON_WORDS: Final = ("what", "is", "statquest", "awesome", LESSON_END)

KINDS: Final = ("bpe", "char", "word")
_BYTES = 256
_LONGEST_RUN = 256  # maximum run of characters without a space, or of spaces, in which merges are learnt
_SAID_EVERY = 5.0  # seconds
_MANY_CHARACTERS = 20_000_000
# Names of EOS tokens in other tokenizers.
_END_NAMES: Final = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[SEP]", LESSON_END)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, and the tokens that begin and end a document."""

    tokenizer: Tokenizer
    end: int  # generation ends at this id
    begin: int | None  # the post-processor puts it in front of every prompt; None if there is none
    chat_template: str | None = None  # Jinja, renders conversations
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # by the template's names: "bos_token", ...

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text alone. Raises InputError for a character or word that is not in the vocabulary."""
        try:
            with panics_as_errors():
                ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"the text has a word or character that the tokenizer does not know ({error})") from None
        return ids

    def encode_many(self, texts: Sequence[str], places: Sequence[str], *, offsets: bool = False) -> list[Encoding]:
        """Returns the encoding of each text alone. Uses all cores. Raises InputError naming the text's place."""
        encode = self._bare.encode_batch if offsets else self._bare.encode_batch_fast
        try:
            with panics_as_errors():
                found: list[Encoding] = encode(list(texts), add_special_tokens=False)
        except Exception:
            for text, place in zip(texts, places, strict=True):
                try:
                    self.encode(text)
                except InputError as error:
                    raise InputError(f"{place}: {error}") from None
            raise
        return found

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer without its post-processor, which may cut the spaces of tokens from their offsets."""
        return Tokenizer.from_str(json.dumps(json.loads(self.tokenizer.to_str()) | {"post_processor": None}))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, of which one ends a turn."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special) | {self.end}

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt, with the tokens that the tokenizer adds."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, without special tokens."""
        text: str = self.tokenizer.decode(ids)
        return text

    def documents(self, texts: Sequence[str], places: Sequence[str]) -> list[list[int]]:
        """Returns documents as training reads them: BOS, text, and EOS unless the next BOS is the same token."""
        begin = [] if self.begin is None else [self.begin]
        end = [] if self.begin == self.end else [self.end]
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
        encoded = self.encode_many([piece for _, piece in pieces], [places[number] for number, _ in pieces])
        documents = [list(begin) for _ in texts]
        for (number, _), encoding in zip(pieces, encoded, strict=True):
            documents[number] += encoding.ids
        return [document + end for document in documents]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        (folder / names.TOKENIZER).write_text(self.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        added = self.tokenizer.encode("").ids  # the post-processor adds them around every text
        config: dict[str, Any] = dict(self.special_tokens)
        config |= {
            "tokenizer_class": names.TOKENIZER_CLASS,
            # transformers.js runs the post-processor only if one of these is true.
            "add_bos_token": self.begin is not None,
            "add_eos_token": self.end in added[self.begin is not None :],
            "bos_token": self.special_tokens.get("bos_token")
            if self.begin is None
            else self.tokenizer.id_to_token(self.begin),
            "eos_token": self.tokenizer.id_to_token(self.end),
            "clean_up_tokenization_spaces": False,
            # Otherwise transformers adds token_type_ids, which generate() rejects.
            "model_input_names": [names.INPUT_IDS, names.ATTENTION_MASK],
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / names.TOKENIZER_CONFIG).write_text(content, encoding="utf-8")


def make_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Returns a tokenizer of a kind in KINDS, trained on the documents, or else the one in the file named `kind`."""
    if kind == "bpe":
        return train_bpe(documents, vocab_size)
    if kind == "char":
        return train_char(documents)
    if kind == "word":
        return train_word(documents, vocab_size)
    return read_tokenizer(Path(kind))


def train_bpe(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains byte-level BPE: any UTF-8 text decodes unchanged. The same documents give the same tokenizer."""
    if vocab_size <= _BYTES:
        raise InputError(
            f"--vocab-size is {vocab_size}; byte-level BPE needs at least {_BYTES + 1}, or use --tokenizer char"
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Training needs quadratic time in the longest run: 80,000 letters without a space needed 47 s, with this split 1
    # s.
    runs = pre_tokenizers.Split(Regex(rf"\S{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([runs, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train(tokenizer, trainer, (piece for text in documents for piece in _pieces(text)))
    tokenizer.pre_tokenizer = words  # encoding needs linear time, and every program supports this one
    return _beginning_with_end(tokenizer)


def _train(tokenizer: Tokenizer, trainer: Any, texts: Iterable[str]) -> None:
    """Trains the tokenizer, and prints its progress if that is slow."""
    started = said = time.monotonic()

    def counted() -> Iterator[str]:
        nonlocal said
        size = 0
        for text in texts:
            yield text
            size += len(text)
            if time.monotonic() - said > _SAID_EVERY:
                said = time.monotonic()
                say(f"training the tokenizer: {size / 1e6:,.0f} million characters read in {said - started:.0f} s")
        if said > started or size > _MANY_CHARACTERS:
            say(f"training the tokenizer: all {size / 1e6:,.0f} million characters read, now their tokens are chosen")

    with panics_as_errors():
        tokenizer.train_from_iterator(counted(), trainer)


def train_char(documents: Iterable[str]) -> TextTokenizer:
    """One token per character that occurs. A text with any other character is an error."""
    characters = sorted({character for text in documents for character in text})
    vocabulary = {token: number for number, token in enumerate([END_OF_TEXT, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _beginning_with_end(tokenizer)


def train_word(documents: Iterable[str], vocab_size: int) -> TextTokenizer:
    """The most frequent words and punctuation marks, and one token for all others. Spacing is lost."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, UNKNOWN)]
    trainer = trainers.WordLevelTrainer(
        vocab_size=max(vocab_size, len(specials) + 1), special_tokens=specials, show_progress=False
    )
    _train(tokenizer, trainer, documents)
    return _beginning_with_end(tokenizer)


def lesson_tokenizer() -> TextTokenizer:
    """The classic lesson's: five words, and <EOS> after every prompt. `encode` rejects any other word."""
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(LESSON_WORDS)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(LESSON_END, special=True, normalized=False)])
    end = LESSON_WORDS.index(LESSON_END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {LESSON_END}", special_tokens=[(LESSON_END, end)]
    )
    return TextTokenizer(tokenizer, end=end, begin=None)


def read_tokenizer(path: Path) -> TextTokenizer:
    """Reads a tokenizer.json, and the tokenizer_config.json and chat_template.jinja next to it if there are any.

    The EOS token is the configuration's, or one with a common name.
    """
    if not path.exists():
        raise MissingFileError(
            f"no tokenizer {str(path)!r}: it must be {', '.join(KINDS)} or the path of a tokenizer.json"
        )
    tokenizer = open_tokenizer(Tokenizer, read_bytes(path, MOST_BYTES), path)
    require_dense(tokenizer.get_vocab(), path)
    special_tokens, chat_template = _beside(path)
    end_names = [special_tokens["eos_token"]] if "eos_token" in special_tokens else []
    end_names += _END_NAMES
    end = next((number for name in end_names if (number := tokenizer.token_to_id(name)) is not None), None)
    if end is None:
        raise InputError(f"{path} has no EOS token; one of {', '.join(_END_NAMES)} was expected among its tokens")
    with reading(path, "a tokenizer.json"):
        probe = tokenizer.encode(str(tokenizer.id_to_token(end)))
        # 1 for a token that the post-processor adds, 0 for the text's own
        added_in_front = bool(probe.special_tokens_mask[0])
    begin = probe.ids[0] if added_in_front else None
    return TextTokenizer(tokenizer, end, begin, chat_template, special_tokens)


def _beside(path: Path) -> tuple[dict[str, str], str | None]:
    """Returns the special tokens by their names, and the chat template, from the files next to a tokenizer.json."""
    file = path.with_name(names.TOKENIZER_CONFIG)
    config = read_json(file) if path.name == names.TOKENIZER and file.exists() else {}
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    file = path.with_name(names.CHAT_TEMPLATE)
    if path.name == names.TOKENIZER and file.exists():  # has precedence, as in transformers
        template = read_text(file)
    return tokens, template if isinstance(template, str) else None


def _beginning_with_end(tokenizer: Tokenizer) -> TextTokenizer:
    """Uses the EOS token as the BOS token as well, so that an empty prompt begins a document."""
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
    )
    return TextTokenizer(tokenizer, end=end, begin=end)


def _pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cuts a long text into pieces of about `size` characters, before spaces: encoding all at once needs gigabytes."""
    start = 0
    while len(text) - start > 2 * size:
        cut = text.find(" ", start + size, start + 2 * size)
        cut = start + size if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]
