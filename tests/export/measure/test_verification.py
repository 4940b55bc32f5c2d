"""What a verification says of itself."""

from __future__ import annotations

import json

import pytest

from pastkey.errors import ParityError
from pastkey.export.measure.verification import Check, Verification


def test_a_verification_is_the_same_after_json():
    checks = (
        Check("prefill", True, "mean_kl", 0.25, 0.5),
        Check("greedy", True, "first_difference", None, None, "why"),
    )
    made = Verification("source", 7, checks, {"kl_divergence": 0.125})
    assert Verification.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_first_check_that_failed_is_told():
    checks = tuple(Check(name, ok, "mean_kl", 1.0, 0.5, name) for name, ok in (("a", True), ("b", False), ("c", False)))
    verification = Verification("source", 7, checks, {})
    assert not verification.ok
    with pytest.raises(ParityError, match=r"^the bundle does not compute what its source computes: b$"):
        verification.require_ok("the bundle")
