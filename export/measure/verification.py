"""The result of `verify`: a figure and a limit for each check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pastkey.errors import ParityError


@dataclass(frozen=True)
class Check:
    """One comparison: its figure, and its limit."""

    name: str
    ok: bool
    # "max_relative_difference", "mean_kl" (nats), "first_difference" (of the token ids, or null), or
    # "mean_cosine_distance" (1 - cosine)
    measure: str
    value: float | int | None
    limit: float | None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one bundle, and int8's or int4's distance from float32 if the source was available.

    Attributes:
        reference: "source" or "own uncached run".
        tokens: Of the text that was compared.
        checks: In the order in which they ran.
        quality: kl_divergence (nats) and top1_agreement (share, 0 to 1) against the source in float32; else empty.
    """

    reference: str
    tokens: int
    checks: tuple[Check, ...]
    quality: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """One entry per check, as `pastkey verify --json` prints them and the manifest stores them."""
        checks = {check.name: {k: v for k, v in asdict(check).items() if k != "name"} for check in self.checks}
        return {"ok": self.ok, "reference": self.reference, "tokens": self.tokens, "checks": checks} | self.quality

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Verification:
        """The inverse of `to_json`."""
        checks = tuple(Check(name, **check) for name, check in content["checks"].items())
        quality = {key: value for key, value in content.items() if key not in ("ok", "reference", "tokens", "checks")}
        return cls(content["reference"], content["tokens"], checks, quality)

    def require_ok(self, what: str) -> None:
        """Raises ParityError with the first check that failed."""
        failed = next((check for check in self.checks if not check.ok), None)
        if failed is not None:
            raise ParityError(f"{what} does not compute what its source computes: {failed.detail}")
