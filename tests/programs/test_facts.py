"""The lists that were copied out of other programs, against these programs as they are installed now."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import environment
from pastkey.export.compat import facts

from ..shared import ran
from .environments import OPTIMUM, node_environment

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

_OF_TRANSFORMERS = """
import json, sys, transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
kinds = json.load(sys.stdin)
print(json.dumps({
    "version": transformers.__version__,
    "decoders": sorted(set(CONFIG_MAPPING.keys()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)),
    "other_names": {kind: CONFIG_MAPPING[kind].attribute_map for kind in kinds},
}))
"""


def folder_of(python: Path, package: str) -> Path:
    """Where an environment has a package."""
    code = f"import importlib.util as u; print(u.find_spec({package!r}).submodule_search_locations[0])"
    return Path(ran(python, "-c", code).stdout.strip())


def quoted(text: str) -> set[str]:
    return set(re.findall(r"""["']([^"']+)["']""", text))


@pytest.fixture(scope="module")
def javascript():
    """The folder of @huggingface's packages."""
    return node_environment(Path(__file__).with_name("package.json")) / "node_modules" / "@huggingface"


def test_transformers_js_reads_the_layers_of_each_type_from_this_key(javascript):
    source = (javascript / "transformers" / "src" / "configs.js").read_text(encoding="utf-8")
    keys: dict[str, str] = {}
    for cases, body in re.findall(r"((?:\s*case '[^']+':)+)(.*?)break;", source, re.DOTALL):
        if key := re.search(r"mapping\['num_layers'\] = '(\w+)'", body):
            keys |= dict.fromkeys(quoted(cases), key[1])
    known = {kind: key for key, kinds in facts._JS_LAYERS_KEY.items() for kind in kinds}
    assert {kind: keys.get(kind) for kind in known} == known
    registry = (javascript / "transformers" / "src" / "models" / "registry.js").read_text(encoding="utf-8")
    decoders = re.search(r"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = new Map\(\[(.*?)\]\);", registry, re.DOTALL)
    assert decoders is not None
    assert set(known) <= set(re.findall(r"\['([^']+)'", decoders[1]))


def test_transformers_has_these_decoders_and_names():
    others = [(key, other, kinds.split()) for key, by in facts._OTHER_NAMES.items() for other, kinds in by.items()]
    asked = sorted({kind for _, _, kinds in others for kind in kinds})
    done = ran(environment(*OPTIMUM), "-c", _OF_TRANSFORMERS, input=json.dumps(asked))
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"].startswith("4.57.")
    assert set(found["decoders"]) >= facts.TRANSFORMERS_TYPES
    for key, other, kinds in others:
        assert {kind: found["other_names"][kind].get(key) for kind in kinds} == dict.fromkeys(kinds, other)


def test_optimum_reads_heads_and_sizes_of_these_types_from_their_own_keys():
    source = folder_of(environment(*OPTIMUM), "optimum.onnxruntime") / "modeling_decoder.py"
    text = source.read_text(encoding="utf-8")
    for ours, key, field in (
        (facts._OPTIMUM_KV_HEADS, "num_key_value_heads", "num_key_value_heads"),
        (facts._OPTIMUM_HEAD_DIM, "embed_size_per_head", "head_dim"),
    ):
        types = re.search(rf"model_type in \{{([^}}]*)\}}:\s+self\.{key} = self\.config\.{field}\n", text)
        assert types is not None
        assert quoted(types[1]) == ours
