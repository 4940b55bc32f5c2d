"""The metrics page, by prometheus-client."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pastkey.runtime import Activity

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAUGES = ("running", "waiting", "cache_bytes", "prefix_bytes", "cached_prefixes")
_HELP = {
    "running": "Requests decoding now.",
    "waiting": "Requests that have not begun.",
    "cache_bytes": "Bytes of the KV caches of running requests.",
    "prefix_bytes": "Bytes of the stored KV caches of ended requests.",
    "cached_prefixes": "Stored KV caches.",
    "steps": "Decoding steps.",
    "batched_tokens": "Tokens decoded in a batch with other requests.",
    "requests": "Requests that ended.",
    "prompt_tokens": "Prompt tokens of these requests.",
    "cached_tokens": "Prompt tokens found in a stored KV cache.",
    "new_tokens": "Generated tokens.",
    "draft_tokens": "Drafted tokens.",
    "accepted_tokens": "Accepted draft tokens.",
}


class ServerMetrics:
    """The counters of one server.

    Attributes:
        requests: HTTP responses by route and status.
        first_token: Seconds from a job's acceptance to its first token, with its time in the queue.
        seconds: Seconds from a job's acceptance to its end.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("pastkey_http_requests", "HTTP responses.", labels, registry=self._registry)
        timed = functools.partial(Histogram, buckets=_SECONDS, registry=self._registry)
        since = "Seconds from the acceptance of a request to its"
        self.first_token = timed("pastkey_time_to_first_token_seconds", f"{since} first token.")
        self.seconds = timed("pastkey_request_seconds", f"{since} end.")

    def watch(self, activity: Callable[[], Activity]) -> None:
        """Shows the activity of a model: `pastkey_running`, `pastkey_new_tokens_total` and the others."""
        self._activity = activity
        self._registry.register(self)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Reads the activity of the model, for prometheus-client."""
        for name, value in dataclasses.asdict(self._activity()).items():
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"pastkey_{name}", _HELP[name], value=value)
