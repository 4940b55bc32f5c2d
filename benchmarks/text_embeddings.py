"""Embeddings of sentences: together beside one by one, the memory they take, and how near int8's are to float32's.

    python -m benchmarks.text_embeddings BUNDLE [--reference BUNDLE] [--threads 2] [--rounds 9]

Bundles that were exported with --hidden-states. The ratio is of processor time, so that a busy machine tells the same.
Memory is the peak of this process: what the sentences add to that of generating, and what a session adds that is opened
beside it for embeddings alone. With --reference, the float32 bundle of the same model, its cosines are told. Linux and
macOS.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from pastkey.runtime import LanguageModel, load
from pastkey.runtime.engine.engine import Engine

from .peers.workers.protocol import peak_rss_bytes
from .speculation import STORY

SENTENCES, TOKENS = 24, 7


def sentences(model: LanguageModel) -> list[list[int]]:
    """Ids of a story, cut into texts of one length."""
    ids = model.prompt_ids(STORY)
    return [[ids[(TOKENS * place + i) % len(ids)] for i in range(TOKENS)] for place in range(SENTENCES)]


def memory(model: LanguageModel, texts: list[list[int]]) -> tuple[int, int]:
    """Bytes that the sentences add to the peak of generating, and that a second session adds to that."""
    model.generate(texts[0], max_new_tokens=16)
    generated = peak_rss_bytes()
    model.embed(texts)
    embedded = peak_rss_bytes()
    engine = Engine(model.bundle, threads=model.require_open().graph.threads)
    engine.hidden_states([texts[0]])
    return embedded - generated, peak_rss_bytes() - embedded


def ratios(model: LanguageModel, texts: list[list[int]], rounds: int) -> list[float]:
    """The processor's time for all sentences together over that for one by one, in each round."""

    def together() -> None:
        model.embed(texts)

    def singly() -> None:
        for text in texts:
            model.embed(text)

    found = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            started = time.process_time()
            (together, singly)[place]()
            seconds[place] = time.process_time() - started
        found.append(seconds[0] / seconds[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, help="the float32 bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    model = load(arguments.bundle, threads=arguments.threads)
    texts = sentences(model)
    own, session = memory(model, texts)
    print(f"memory: {own / 2**20:.0f} MiB more than generating; a session of its own {session / 2**20:.0f}")
    found = ratios(model, texts, arguments.rounds)
    median = statistics.median(found)
    print(f"together / one by one: {median:.2f} of the processor's time ({min(found):.2f} to {max(found):.2f})")
    if arguments.reference is not None:
        with load(arguments.reference, threads=arguments.threads) as reference:
            cosines = np.sum(model.embed(texts) * reference.embed(texts), axis=1)
        print(f"cosine with {arguments.reference}: {cosines.min():.5f} at least, {cosines.mean():.5f} on average")


if __name__ == "__main__":
    main()
