"""What drafts bring: speed with prompt lookup and a draft model over one token a step, and how often they are accepted.

    python -m benchmarks.speculation BUNDLE --draft BUNDLE2

Speeds are decode alone, in processor time of one thread, so that others on the machine count little: medians of
interleaved rounds, and their range. The tasks go on from several places of a text; copy a passage, as two examples do,
which a model of any size does word for word, and which is what prompt lookup is for; and ask a conversational model to
repeat one, which a small one tells in other words. Whether a draft pays is decided by the same clock.

Acceptance is of a draft token at each place of the text: what coupling by the place's random number gives, which keeps
a seed's text as it is, and what rejection sampling would give, which does not: the sum of the smaller probabilities.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.errors import PastkeyError
from pastkey.runtime import Chunk, Completion, LanguageModel, load
from pastkey.runtime.model.draft_model import timed_worth
from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.sampling import truncation

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
STORY = (
    "Once upon a time there was a little red boat. It lived in a harbour with big grey ships. Every morning the boat "
    "watched the ships go out to sea. One day a storm came, and a fishing net was caught on the rocks where no big "
    "ship could go. The little boat was small enough. It went between the rocks, pulled the net free and came home wet "
    "and happy. From then on the big ships blew their horns whenever it passed."
)
PASSAGE = 80  # words that are copied
REPEAT = "Repeat the following text word for word, without any comment.\n\n"


def prompts(model: LanguageModel, text: str, count: int, tokens: int) -> Iterator[list[int]]:
    """Beginnings of so many tokens at several places of a text."""
    ids = model.prompt_ids(text)
    for place in range(count):
        start = place * max(1, (len(ids) - tokens) // count)
        yield ids[start : start + tokens]


def copying(text: str, count: int) -> Iterator[str]:
    """Each asks for a copy of a passage, behind two others of the text and their copies."""
    words = text.split()
    size = min(PASSAGE, len(words) // 3)
    for place in range(count):
        start = place * max(1, (len(words) - 3 * size) // count)
        *shown, last = (" ".join(words[first : first + size]) for first in range(start, start + 3 * size, size))
        yield "".join(f"Text: {one}\nCopy: {one}\n\n" for one in shown) + f"Text: {last}\nCopy:"


def tasks(model: LanguageModel, text: str, count: int, tokens: int) -> dict[str, list[Task]]:
    """Each gives a stream for the options of a call."""
    found: dict[str, list[Task]] = {
        "continue": [partial(model.stream, prompt) for prompt in prompts(model, text, count, tokens)],
        "copy": [partial(model.stream, prompt, stop=["\n"]) for prompt in copying(text, count)],
    }
    with contextlib.suppress(PastkeyError):  # no conversational model
        model.chat()
        found["repeat"] = [lambda **options: model.chat().stream(REPEAT + STORY, **options)]
    return found


def decode(task: Task, options: dict[str, Any]) -> tuple[float, Completion]:
    """Seconds from the first token to the last, and the completion."""
    stream = task(**options)
    next(stream)
    started = time.process_time()
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return time.process_time() - started, end.value


def measure(name: str, tasks: list[Task], ways: list[str], new: int, rounds: int) -> None:
    for kind, settings in SETTINGS.items():
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        counts = {way: [0, 0] for way in ways}
        same = dict.fromkeys(ways, True)
        for task in tasks * rounds:
            alone = 0.0, list[int]()
            for way in ways:
                seconds, done = decode(task, {"max_new_tokens": new, **settings, **WAYS[way]})
                alone = alone if alone[1] else (seconds, done.ids)
                counts[way][0] += done.draft_tokens
                counts[way][1] += done.accepted_tokens
                same[way] &= done.ids == alone[1]
                ratios[way].append(alone[0] / seconds)
        for way in ways[1:]:
            found, (drafted, accepted) = ratios[way], counts[way]
            share = f"{accepted / drafted:.0%} of {drafted} draft tokens accepted" if drafted else "no draft"
            told = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}), {share}"
            print(f"{name:8} {kind:6} {way:6}: {told}{'' if same[way] else '; another text'}", flush=True)


def probabilities(logits: npt.NDArray[np.float32], temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    scaled = truncation.apply_temperature(logits, temperature)
    return truncation.softmax(truncation.keep_top_p(scaled, top_p) if top_p < 1 else scaled)


def acceptance(model: LanguageModel, draft: LanguageModel, ids: list[int]) -> None:
    """Prints how often a draft token is accepted at the places of a text."""
    mine, its = model.logits(ids), draft.logits(ids)
    agreed = float(np.mean(mine.argmax(1) == its.argmax(1)))
    print(f"greedy: the same token at {agreed:.3f} of {len(ids)} places")
    for temperature, top_p in ((1.0, 1.0), (0.8, 0.95)):
        coupled, rejection = [], []
        for one, other in zip(mine, its, strict=True):
            p, q = probabilities(one, temperature, top_p), probabilities(other, temperature, top_p)
            ends = np.minimum(np.cumsum(p), np.cumsum(q))
            begins = np.maximum(np.cumsum(p) - p, np.cumsum(q) - q)
            coupled.append(np.maximum(0, ends - begins).sum())
            rejection.append(np.minimum(p, q).sum())
        print(
            f"temperature {temperature}, top_p {top_p}: coupled {np.mean(coupled):.3f}, "
            f"rejection sampling {np.mean(rejection):.3f}",
            flush=True,
        )


def reverse(model: LanguageModel) -> None:
    """Turns the logits of the draft model round, which takes it no longer."""
    assert model.draft is not None, "--useless is for a draft model: name one with --draft"
    graph = model.draft.model.parts.require_open().graph
    run = graph.run

    def reversed_run(*arguments: Any) -> Any:
        return run(*arguments)[..., ::-1]

    graph.run = reversed_run  # type: ignore[method-assign, assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--text", type=Path, help="UTF-8, where prompts begin (default: a story of this file)")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--useless", action="store_true", help="turn the draft model's logits round: none is right")
    parser.add_argument("--acceptance", action="store_true", help="measure acceptance alone")
    arguments = parser.parse_args()
    model = load(arguments.bundle, threads=1, draft=arguments.draft)
    text = STORY if arguments.text is None else arguments.text.read_text(encoding="utf-8")[:100_000]
    print(f"onnxruntime {onnxruntime.__version__}, {os.cpu_count()} processors, one thread")
    if model.draft is not None:
        draft = model.draft.model
        assert isinstance(draft, LanguageModel)
        model.draft.worth = timed_worth(draft.require_open().graph, time.process_time)
        length = min(256, model.manifest.context_length, draft.manifest.context_length)
        acceptance(model, draft, model.prompt_ids(text)[:length])
    if arguments.acceptance:
        return
    if arguments.useless:
        reverse(model)
    ways = list(WAYS) if model.draft is not None else ["alone", "lookup"]
    for name, some in tasks(model, text, arguments.places, arguments.prompt_tokens).items():
        measure(name, some, ways, arguments.new_tokens, arguments.rounds)


if __name__ == "__main__":
    main()
