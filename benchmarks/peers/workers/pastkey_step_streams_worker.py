"""pastkey's streams without prompt_lookup: a step for each token, as the other engines decode."""

from __future__ import annotations

from pastkey_streams_worker import PastkeyStreams
from protocol import serve


class StepStreams(PastkeyStreams):
    prompt_lookup = False


if __name__ == "__main__":
    serve(StepStreams)
