"""The decoders that `see` looks into, each exported once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import export

from ..export import decoders
from ..export.families import CONTEXT, build
from ..export.graft.own.parts import CONTEXT as OWN_CONTEXT
from ..export.graft.own.registry import DECODERS


def module_of(name: str) -> tuple[nn.Module, int]:
    """A decoder of the tests of export and its context: `hf:FAMILY`, `own:NAME`, or one of those here."""
    kind, _, rest = name.partition(":")
    if kind == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
        return build(rest), CONTEXT
    if kind == "own":
        return DECODERS[rest].make(), OWN_CONTEXT
    if kind == "plain":
        return decoders.Plain(layers=2, kv_heads=2), 40
    return getattr(decoders, name)(), 40


@pytest.fixture(scope="session")
def bundle_of(made_once):
    """bundle_of(NAME, **options): that decoder's float32 bundle, or as the options of `export` say."""

    def bundle(name: str, **options: str) -> Bundle:
        def make(folder: Path) -> None:
            module, context = module_of(name)
            export(module, folder / "bundle", **({"precision": "fp32"} | options), context_length=context)  # type: ignore[arg-type]

        title = "-".join([name.replace(":", "-"), *options.values()])
        return open_bundle(made_once(f"see-{title}", make) / "bundle")

    return bundle


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""
