"""How many tokens to draft, by the acceptance of the request's earlier drafts of one kind.

The lengths are constants: running four tokens at once costs 1.4 steps, and eight 1.8 (SmolLM2-135M int8, with the
native kernels and with onnxruntime's).
"""

from __future__ import annotations

from ..settings import MAX_DRAFT_TOKENS


class DraftLength:
    """Drafts of one token, of three and of seven while they are accepted whole; of one again after a rejected token.

    Attributes:
        most: Number of tokens of the next draft.
        rejections: Number of drafts since the last one of which a token was accepted.
    """

    def __init__(self) -> None:
        self.most = 1
        self.rejections = 0

    def record(self, drafted: int, accepted: int) -> None:
        """Records how many tokens of a draft were accepted. A shortened draft does not change the length."""
        self.rejections = 0 if accepted else self.rejections + 1
        if accepted < drafted:
            self.most = 1
        elif drafted == self.most:
            self.most = min(2 * drafted + 1, MAX_DRAFT_TOKENS)
