"""Measures how well a bundle predicts a text, and how far its predictions are from a reference's.

A text is evaluated window by window, so that only one window's logits are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..progress import SILENT, Progress
from ..settings import GREEDY_PROMPT_TOKENS, GREEDY_PROMPTS, GREEDY_TOKENS
from .metrics import Ids, Sums, perplexity
from .predictors import BundlePredictor, Predictor, agreeing


@dataclass(frozen=True)
class Evaluation:
    """The figures of one bundle on one text. Those that need a reference are None without one.

    Attributes:
        perplexity: exp of the mean loss in nats over every token of a window but its first.
        kl_divergence: KL(reference || bundle) in nats, mean over all positions.
        top1_agreement: Share of positions whose most likely token is the same, 0 to 1.
        greedy_agreement: Share of tokens of greedy continuations, 0 to 1, as `evaluate` defines it.
        reference_perplexity: The reference's, on the same tokens.
        tokens: In all windows.
        windows: Their number.
        length: Tokens of the longest window.
        bundle: As the user wrote it.
        reference: As the user wrote it.
    """

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    greedy_agreement: float | None
    reference_perplexity: float | None
    tokens: int
    windows: int
    length: int
    bundle: str
    reference: str | None

    def to_json(self) -> dict[str, Any]:
        """One entry per figure, as `pastkey eval --json` prints them."""
        return asdict(self)


def evaluate(
    bundle: BundlePredictor,
    windows: Sequence[Ids],
    reference: Predictor | None = None,
    *,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measures a bundle on a text.

    greedy_agreement: the first GREEDY_PROMPT_TOKENS, or half, of each of the first GREEDY_PROMPTS windows are a prompt.
    Both models continue it greedily by GREEDY_TOKENS, or fewer if the longest window has no room for them (the last
    token is not fed, so it may be one beyond that window). The figure is the share of tokens before the first
    difference among all tokens of the continuations.

    Args:
        bundle: The bundle to measure.
        windows: At least one, each (T,) token ids, T >= 2 and within the context of both models.
        reference: The model that the bundle is compared with.
        progress: Advances after each window, and within each continuation.

    Raises:
        NumericsError: Logits that are not finite.
        InputError: A module that fails on a window.
    """
    longest = max(ids.size for ids in windows)
    continued = windows[:GREEDY_PROMPTS] if reference is not None else []
    parts = GREEDY_TOKENS * (len(windows) + len(continued))
    sums = Sums()
    for number, ids in enumerate(windows, 1):
        sums.add(ids, bundle.logits(ids), None if reference is None else reference.logits(ids))
        progress.advance(GREEDY_TOKENS * number, parts)
    figures: dict[str, float | None] = dict.fromkeys(
        ("kl_divergence", "top1_agreement", "greedy_agreement", "reference_perplexity")
    )
    if reference is not None:
        same = written = 0
        for number, ids in enumerate(continued, len(windows)):
            prompt, tokens = ids[: min(GREEDY_PROMPT_TOKENS, ids.size // 2)], list[int]()
            for token in bundle.greedy(prompt, min(GREEDY_TOKENS, longest - prompt.size + 1)):
                tokens.append(token)
                progress.advance(GREEDY_TOKENS * number + len(tokens), parts)
            same += agreeing(reference, prompt, tokens)
            written += len(tokens)
        progress.advance(1, 1)
        figures = {
            "kl_divergence": sums.kl / sums.tokens,
            "top1_agreement": sums.same_top / sums.tokens,
            "greedy_agreement": same / written,
            "reference_perplexity": perplexity(sums.reference_loss / sums.predicted),
        }
    return Evaluation(
        perplexity=perplexity(sums.loss / sums.predicted),
        **figures,
        tokens=sums.tokens,
        windows=len(windows),
        length=longest,
        bundle=bundle.name,
        reference=None if reference is None else reference.name,
    )
