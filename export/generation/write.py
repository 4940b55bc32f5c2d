"""Writes the generation graphs into a bundle, and verifies that their output equals the runtime's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, MissingExtraError, ParityError
from pastkey.runtime import Engine, Generation, Request, SamplingConfig
from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.text.codec import REPLACEMENT, TextCodec, TextStream

from ..graph.session import cpu_session
from ..graph.write.embedding_rows import give_embedding_back
from ..progress import Progress
from .loop import generate_whole, why_no_step
from .text import ReadsOtherwiseError, library, text_operators, with_text

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS, _STEP_TOKENS = 3, 12, 24, 5
_CASES = (
    SamplingConfig(seed=0),
    SamplingConfig(repetition_penalty=1.3, seed=0),
    SamplingConfig(temperature=1.0, seed=7),
    SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=2**62 + 5),
)

_TEXTS = ("Once upon a time", "x = 1")

Array = npt.NDArray[Any]


def write_generation(bundle: Bundle, progress: Progress) -> None:
    """Writes names.GENERATE_GRAPH and, where possible, names.GENERATE_STEP_GRAPH and names.TEXT_GRAPH.

    The tokenizer must be in the bundle's folder already. Raises ParityError if the ids differ from the runtime's.
    """
    progress.stage("write the whole generation as one graph")
    whole = bundle.path / names.GENERATE_GRAPH
    _write(bundle, whole, step=False)
    step = None
    if (reason := why_no_step(bundle.manifest)) is not None:
        progress.warn(f"{names.GENERATE_STEP_GRAPH}, whose cache goes out and in, is not made: {reason}")
    else:
        step = bundle.path / names.GENERATE_STEP_GRAPH
        _write(bundle, step, step=True)
    progress.stage("verify the whole generation: greedy and drawn")
    _require_equal(bundle, whole, step)
    if not (bundle.path / names.TOKENIZER).exists():
        return
    try:
        operators = text_operators(bundle)
    except (MissingExtraError, ReadsOtherwiseError) as error:
        progress.warn(f"{names.TEXT_GRAPH}, which continues a text, is not made: {error}")
        return
    progress.stage("write the whole generation with the tokenizer, and verify it")
    model = ir.load(whole)
    with_text(model, operators)
    ir.save(model, bundle.path / names.TEXT_GRAPH)
    _require_equal_text(bundle)


def settings(sampling: SamplingConfig, max_new_tokens: int, end_ids: tuple[int, ...] = ()) -> dict[str, Array]:
    """Returns the settings of a call as the graphs' inputs."""
    given: dict[str, Any] = {"max_new_tokens": [max_new_tokens], "end_ids": end_ids}
    given |= {"top_k": [sampling.top_k], "seed": [sampling.seed]}
    feeds = {name: np.array(given[name], np.int64) for name in names.GENERATE_INTEGERS}
    return feeds | {name: np.array([getattr(sampling, name)], np.float32) for name in names.GENERATE_NUMBERS}


def _write(bundle: Bundle, path: Path, *, step: bool) -> None:
    model = ir.load(bundle.last_logits_graph)
    give_embedding_back(model, path.parent)
    generate_whole(model, bundle.manifest, step=step)
    ir.save(model, path)


def _expected(bundle: Bundle) -> list[tuple[list[int], SamplingConfig, list[int]]]:
    """Returns prompts, settings and the runtime's ids. Its session ends here: only one holds the weights at a time."""
    vocab, context = bundle.manifest.vocab_size, bundle.manifest.context_length
    engine, rng = Engine(bundle, providers="cpu", threads=1, native=False), np.random.default_rng(0)
    found = []
    for case in _CASES:
        for _ in range(_PROMPTS):
            prompt = rng.integers(0, vocab, int(rng.integers(1, min(_PROMPT_TOKENS, context) + 1))).tolist()
            made = Generation(engine, Request(prompt, max_new_tokens=_NEW_TOKENS, sampling=case, prompt_lookup=False))
            found.append((prompt, case, list(made)))
    return found


def _require_equal(bundle: Bundle, whole: Path, step: Path | None) -> None:
    expected = _expected(bundle)
    session = cpu_session(whole, threads=1)
    for prompt, case, ids in expected:
        feeds = {names.INPUT_IDS: np.array([prompt], np.int64)} | settings(case, _NEW_TOKENS)
        _compare(whole, session.run([names.GENERATED_IDS], feeds)[0], ids)
    del session
    if step is not None:
        session = cpu_session(step, threads=1)
        for prompt, case, ids in expected:
            _compare(step, _in_steps(session, prompt, case, len(ids)), ids)


def _expected_texts(bundle: Bundle, codec: TextCodec) -> list[tuple[str, SamplingConfig, str]]:
    """As `_expected`, for the texts that the tokenizer can encode."""
    engine, ends = Engine(bundle, providers="cpu", threads=1, native=False), bundle.manifest.eos_token_ids
    found = []
    for text in _TEXTS:
        try:
            ids = codec.encode(text)
        except InputError:
            continue
        for case in _CASES:
            made = Generation(
                engine, Request(ids, max_new_tokens=_NEW_TOKENS, end_ids=ends, sampling=case, prompt_lookup=False)
            )
            stream = TextStream(codec, after_text=True)
            found.append((text, case, "".join([*(stream.push(token) for token in made), stream.flush()])))
    return found


def _require_equal_text(bundle: Bundle) -> None:
    expected = _expected_texts(bundle, TextCodec.from_file(bundle.path / names.TOKENIZER))
    session = cpu_session(bundle.path / names.TEXT_GRAPH, threads=1, library=library())
    for text, case, said in expected:
        feeds = settings(case, _NEW_TOKENS, bundle.manifest.eos_token_ids) | {names.TEXT: np.array([text], object)}
        found = str(session.run([names.COMPLETION], feeds)[0][0])
        # Decoders differ in how many U+FFFD replace invalid bytes.
        if found != said and REPLACEMENT not in said:
            raise ParityError(
                f"{names.TEXT_GRAPH} continues with {found!r:.80} and pastkey's runtime with {said!r:.80}: "
                "export without --generate"
            )


def _in_steps(session: Any, prompt: list[int], case: SamplingConfig, count: int) -> list[int]:
    """Returns the ids of several calls, each of which passes its cache and ids to the next."""
    cache = next(value for value in session.get_inputs() if value.name == names.HELD_CACHE)
    kind = np.float16 if cache.type == "tensor(float16)" else np.float32
    state: dict[str, Array] = {
        names.HELD_CACHE: np.zeros([size if isinstance(size, int) else 0 for size in cache.shape], kind),
        names.HELD_IDS: np.zeros(0, np.int64),
    }
    ids, fed = list[int](), prompt
    while len(ids) < count:
        feeds = settings(case, min(_STEP_TOKENS, count - len(ids))) | state
        feeds[names.INPUT_IDS] = np.array([fed], np.int64)
        new, held, said = session.run([names.GENERATED_IDS, names.NEW_CACHE, names.NEW_IDS], feeds)
        ids += new.tolist()
        fed, state = ids[-1:], {names.HELD_CACHE: held, names.HELD_IDS: said}
    return ids


def _compare(path: Path, found: Any, expected: list[int]) -> None:
    ids = [int(token) for token in found]
    if ids != expected:
        place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        raise ParityError(
            f"{path.name} gives other ids than pastkey's runtime from new token {place} on, with onnxruntime "
            f"{onnxruntime.__version__}: export without --generate"
        )
