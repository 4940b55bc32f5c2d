"""The gain of drafts: speed with prompt lookup and a draft model over one token a step, and their acceptance.

Speeds are of decoding only, in CPU time of one thread, so that others on the machine count little. The tasks continue
from several places of a text; copy a passage, as two examples do, which a model of any size does word for word, the
case for prompt lookup; and ask a conversational model to repeat one, which a small one paraphrases.

Acceptance is of a draft token at each place of the text: by coupling with the place's random number, which keeps a
seed's text unchanged, and by rejection sampling, which does not: the sum of the smaller probabilities.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.errors import InputError, PastkeyError
from pastkey.files.folder import read_text
from pastkey.runtime import Chunk, Completion, LanguageModel, load
from pastkey.runtime.sampling import truncation

from .measure import Answer, Spread, Table, TextFile, facts_of, interleaved
from .texts import STORY

Task = Callable[..., Generator[Chunk, None, Completion]]
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"prompt_lookup": False, "draft": False},
    "lookup": {"prompt_lookup": True, "draft": False},
    "draft": {"prompt_lookup": False, "draft": True},
    "both": {"prompt_lookup": True, "draft": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
}
PASSAGE = 80  # words that are copied
REPEAT = "Repeat the following text word for word, without any comment.\n\n"


def speculation(
    bundle: Path,
    *,
    draft: Path | None = None,
    text: TextFile | None = None,
    prompt_tokens: int = 48,
    new_tokens: int = 96,
    places: int = 4,
    rounds: int = 3,
    useless: bool = False,
) -> Answer:
    """Arms: a token a step, prompt lookup, a draft model, both. Metric: CPU time of decoding; accepted drafts."""
    model = load(bundle, threads=1, draft=draft)
    whole = STORY if text is None else read_text(text)[:100_000]
    ways = WAYS if model.draft is not None else {way: WAYS[way] for way in ("alone", "lookup")}
    if model.draft is not None:
        other = model.draft.model
        assert isinstance(other, LanguageModel)
        length = min(256, model.manifest.context_length, other.manifest.context_length)
        yield _acceptance(model, other, model.prompt_ids(whole)[:length])
    if useless:
        _reverse(model)
    rows = []
    for name, tasks in _tasks(model, whole, places, prompt_tokens).items():
        for kind, settings in SETTINGS.items():
            options = {"max_new_tokens": new_tokens, **settings}
            measured = [
                one
                for task in tasks
                for one in interleaved(
                    {way: partial(_decode, task, options | how) for way, how in ways.items()},
                    rounds,
                    f"{name}, {kind}",
                    warm=False,
                )
            ]
            for way in [*ways][1:]:
                speed = Spread.of(one["alone"][0] / one[way][0] for one in measured)
                drafted, accepted = (
                    sum(getattr(one[way][1], count) for one in measured)
                    for count in ("draft_tokens", "accepted_tokens")
                )
                same = all(one[way][1].ids == one["alone"][1].ids for one in measured)
                share = f"{accepted / drafted:.0%} of {drafted}" if drafted else "no draft"
                rows.append([name, kind, way, f"{speed}", share, "yes" if same else "no"])
    columns = ["task", "tokens are", "drafts by", "speed over one token a step", "accepted", "same text"]
    yield Table("Speed of decoding with drafts:", columns, rows)
    yield facts_of(model.bundle, 1)


def _acceptance(model: LanguageModel, draft: LanguageModel, ids: list[int]) -> Table:
    """How often a draft token is accepted at the places of a text."""
    mine, its = model.logits(ids), draft.logits(ids)
    rows = [["greedy", f"{np.mean(mine.argmax(1) == its.argmax(1)):.3f}", ""]]
    for temperature, top_p in ((1.0, 1.0), (0.8, 0.95)):
        coupled, rejection = [], []
        for one, other in zip(mine, its, strict=True):
            p, q = _probabilities(one, temperature, top_p), _probabilities(other, temperature, top_p)
            ends = np.minimum(np.cumsum(p), np.cumsum(q))
            begins = np.maximum(np.cumsum(p) - p, np.cumsum(q) - q)
            coupled.append(np.maximum(0, ends - begins).sum())
            rejection.append(np.minimum(p, q).sum())
        settings = f"temperature {temperature}, top_p {top_p}"
        rows.append([settings, f"{np.mean(coupled):.3f}", f"{np.mean(rejection):.3f}"])
    sentence = f"Share of draft tokens that are accepted, over {len(ids)} places of the text:"
    return Table(sentence, ["settings", "here", "by rejection sampling"], rows)


def _probabilities(logits: npt.NDArray[np.float32], temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    scaled = truncation.apply_temperature(logits, temperature)
    return truncation.softmax(truncation.keep_top_p(scaled, top_p) if top_p < 1 else scaled)


def _tasks(model: LanguageModel, text: str, count: int, tokens: int) -> dict[str, list[Task]]:
    """Each gives a stream for the options of a call."""
    ids, apart = model.prompt_ids(text), max(1, (len(model.prompt_ids(text)) - tokens) // count)
    found: dict[str, list[Task]] = {
        "continue": [partial(model.stream, ids[place * apart :][:tokens]) for place in range(count)],
        "copy": [partial(model.stream, prompt, stop=["\n"]) for prompt in _copying(text, count)],
    }
    with contextlib.suppress(PastkeyError):  # not a conversational model
        model.chat()
        found["repeat"] = [lambda **options: model.chat().stream(REPEAT + STORY, **options)]
    return found


def _copying(text: str, count: int) -> Iterator[str]:
    """Each asks for a copy of a passage, behind two others of the text and their copies."""
    words = text.split()
    size = min(PASSAGE, len(words) // 3)
    for place in range(count):
        start = place * max(1, (len(words) - 3 * size) // count)
        *shown, last = (" ".join(words[first : first + size]) for first in range(start, start + 3 * size, size))
        yield "".join(f"Text: {one}\nCopy: {one}\n\n" for one in shown) + f"Text: {last}\nCopy:"


def _decode(task: Task, options: dict[str, Any], _: int) -> tuple[float, Completion]:
    """Seconds from the first token to the last, and the completion."""
    stream = task(**options)
    next(stream)
    started = time.process_time()
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return time.process_time() - started, end.value


def _reverse(model: LanguageModel) -> None:
    """Reverses the logits of the draft model, so that no draft is right."""
    if model.draft is None:
        raise InputError("--useless is for a draft model: name one with --draft")
    graph = model.draft.model.parts.require_open().graph
    run = graph.run

    def reversed_run(*arguments: Any) -> Any:
        return run(*arguments)[..., ::-1]

    graph.run = reversed_run  # type: ignore[method-assign, assignment]
