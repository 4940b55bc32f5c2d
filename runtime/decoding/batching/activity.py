"""How busy a model is, for a program that shows or limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Counted when a request ends; the later ones are attributes of its Generation.
TOTALS: Final = ("requests", "prompt_tokens", "cached_tokens", "new_tokens", "draft_tokens", "accepted_tokens")


@dataclass(frozen=True)
class Activity:
    """A model at one moment. The last eight are totals since it was loaded.

    Attributes:
        running: Requests that have begun and not ended.
        waiting: Requests that have not begun.
        cache_bytes: Bytes of the KV caches of running requests.
        prefix_bytes: Bytes of the stored KV caches of ended requests.
        cached_prefixes: Number of these caches.
        steps: Steps of the scheduler.
        batched_tokens: Tokens that were decoded together with another request's.
        requests: Ended requests, like all that follow.
        prompt_tokens: Tokens of their prompts.
        cached_tokens: Prompt tokens that were in the cache already.
        new_tokens: New tokens that were read.
        draft_tokens: Drafted tokens.
        accepted_tokens: Accepted draft tokens.
    """

    running: int
    waiting: int
    cache_bytes: int
    prefix_bytes: int
    cached_prefixes: int
    steps: int
    batched_tokens: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    draft_tokens: int
    accepted_tokens: int
