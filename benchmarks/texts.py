"""The texts that are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, MissingFileError
from pastkey.files.folder import read_text
from pastkey.runtime import Engine, LanguageModel
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.codec import TextCodec

from .measure import ROOT, Once

WINDOW = 512  # tokens
_BESIDE = ROOT.parent / "shared" / "data" / "wikitext-2" / "valid.txt"  # used where it is, never required

STORY = (
    "Once upon a time there was a little red boat. It lived in a harbour with big grey ships. Every morning the boat "
    "watched the ships go out to sea. One day a storm came, and a fishing net was caught on the rocks where no big "
    "ship could go. The little boat was small enough. It went between the rocks, pulled the net free and came home wet "
    "and happy. From then on the big ships blew their horns whenever it passed."
)
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days are in a week?",
    "What color is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?",
    "What is the chemical symbol for gold?",
    "At what temperature does water boil, in degrees Celsius?",
    "How many legs does a spider have?",
    "What is the largest ocean on Earth?",
    "In which country are the pyramids of Giza?",
    "Who painted the Mona Lisa?",
    "What gas do plants take in from the air?",
    "How many continents are there?",
    "What is the opposite of hot?",
    "What is 7 plus 5?",
    "Which planet is known as the Red Planet?",
    "What is the tallest mountain in the world?",
    "What language is spoken in Brazil?",
    "How many sides does a triangle have?",
    "What is frozen water called?",
    "Which animal is known as the king of the jungle?",
    "What is the currency of the United Kingdom?",
    "Who was the first person to walk on the Moon?",
    "What do bees make?",
)


def story_ids(lm: LanguageModel, count: int) -> list[int]:
    """So many ids of the story, which begins anew where it ends."""
    ids = lm.prompt_ids(STORY)
    return [ids[place % len(ids)] for place in range(count)]


@dataclass(frozen=True)
class Text:
    """Token ids to measure on."""

    name: str  # for a reader
    windows: tuple[tuple[int, ...], ...]  # each WINDOW ids

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(map(len, self.windows))

    def prompt(self, length: int, first: int = 0) -> list[int]:
        """`length` ids, `tokens` at most, from the window number `first` on, counted around."""
        turn = first % len(self.windows)
        ids = [token for window in (*self.windows[turn:], *self.windows[:turn]) for token in window]
        assert length <= len(ids), "a text that repeats itself would be easy to guess"
        return ids[:length]


def open_text(given: Path | None, bundle: Bundle, threads: int, once: Once, *, own: int, most: int) -> Text:
    """Windows of a file: --text, or wikitext-2 next to the checkout, `most` at most. Or `own` that the model writes.

    Raises MissingFileError or InputError.
    """
    file = given or _BESIDE
    if given is None and not _BESIDE.is_file():

        def write() -> Any:
            from pastkey.export.measure.texts import self_generated_texts, start_token

            texts = self_generated_texts(Engine(bundle, threads=threads), start_token(bundle.manifest), own, WINDOW)
            return [text.tolist() for text in texts]

        windows = once("text", write)
        return Text("a text that the float32 model wrote itself (temperature 1)", tuple(map(tuple, windows)))
    if not file.is_file():
        raise MissingFileError(f"no such text: {file} is not a file")
    text, codec = read_text(file), codec_of(bundle)
    ids = codec.encode(text, add_special_tokens=False)
    whole = codec.encode(text)
    begin = next((whole[:n] for n in range(3) if whole[n : n + 8] == ids[:8]), [])  # as the tokenizer begins a text
    size = WINDOW - len(begin)
    if len(ids) < size:
        raise InputError(f"{file} has {len(ids)} tokens; one window of {WINDOW} tokens is needed: give a longer --text")
    name = "wikitext-2's validation text" if file == _BESIDE else file.name
    count = min(most, len(ids) // size)
    return Text(name, tuple((*begin, *ids[i * size : (i + 1) * size]) for i in range(count)))


def codec_of(bundle: Bundle) -> TextCodec:
    """The bundle's tokenizer. Raises InputError without one."""
    if bundle.tokenizer is None:
        raise InputError(f"{bundle.path} has no tokenizer, and texts are measured on: export with a tokenizer.json")
    return TextCodec.from_file(bundle.tokenizer)


def question_ids(bundle: Bundle) -> list[list[int]]:
    """The questions as prompts, by the chat template where the bundle has one."""
    codec = codec_of(bundle)
    try:
        template = ChatTemplate.from_bundle(bundle)
    except InputError:
        return [codec.encode(f"Question: {question}\nAnswer:") for question in QUESTIONS]
    texts = [template.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [codec.encode(text, add_special_tokens=False) for text in texts]
