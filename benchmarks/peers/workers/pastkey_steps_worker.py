"""pastkey without prompt_lookup: a step for each token, as the other engines decode."""

from __future__ import annotations

from pastkey_worker import Pastkey
from protocol import serve


class TokenByToken(Pastkey):
    prompt_lookup = False


if __name__ == "__main__":
    serve(TokenByToken)
