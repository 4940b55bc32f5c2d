"""The decoders that `see` looks into, each exported once."""

import json
import re

import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.export import export

from ..export import decoders
from ..export.families import CONTEXT, build
from ..export.graft.own.parts import CONTEXT as OWN_CONTEXT
from ..export.graft.own.registry import DECODERS


def module_of(name):
    """A decoder of the tests of export and its context: `hf:FAMILY`, `own:NAME`, or one of those here."""
    kind, _, rest = name.partition(":")
    if kind == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
        return build(rest), CONTEXT
    if kind == "own":
        return DECODERS[rest].make(), OWN_CONTEXT
    return decoders.Plain(layers=2, kv_heads=2) if kind == "plain" else getattr(decoders, name)(), 40


def data_of(content):
    """The numbers of a page."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="session")
def bundle_of(made_once):
    """bundle_of(NAME, **options): that decoder's float32 bundle, or as the options of `export` say."""

    def bundle(name, **options):
        def make(folder):
            module, context = module_of(name)
            export(module, folder / "bundle", **{"precision": "fp32"} | options, context_length=context)

        title = "-".join([name.replace(":", "-"), *options.values()])
        return open_bundle(made_once(f"see-{title}", make) / "bundle")

    return bundle


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""
