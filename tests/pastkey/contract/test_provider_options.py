"""The options of providers that a manifest may set: no path, no library, no address."""

from __future__ import annotations

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import read_bundle
from pastkey.contract.provider_options import in_manifest, not_kept
from pastkey.errors import IntegrityError
from pastkey.files.folder import write_json
from pastkey.providers import PROVIDERS, TARGETS

from ...shared import ROOT
from .test_bundle import MANIFEST

STATIC = {"graph": "static", "static": {"chunk": 4, "masked": -100.0, "windows": [0]}}
# An unknown option, provider or target, and values of each kind that are none of the option's.
HOSTILE = [
    ("qnn", "backend_path", "b/onnx/evil.so"),
    ("qnn", "backend_type", "saver"),
    ("qnn", "htp_arch", "75 "),
    ("qnn", "soc_model", "\u0661"),  # a digit, and none of ASCII's
    ("openvino", "cache_dir", "/tmp/x"),
    ("openvino", "device_type", "CPU\n"),
    ("openvino", "device_type", "/tmp/plugin.so"),
    ("openvino", "num_of_threads", "9" * 18),
    ("cuda", "gpu_external_alloc", "140000000000000"),
    ("webgpu", "webgpuInstance", "140000000000000"),
    ("coreml", "ModelCacheDirectory", "/tmp/x"),
    ("tensorrt", "device_id", "0"),
    ("cpu", "use_arena", "1"),
    ("QNN", "htp_arch", "75"),
    ("nobody", "a", "b"),
]


@pytest.mark.parametrize(("provider", "name", "value"), HOSTILE)
@pytest.mark.parametrize("place", ["target", "compiled"])
def test_an_option_that_a_manifest_may_not_set_is_refused(tmp_path, provider, name, value, place):
    content = MANIFEST | {"target": provider, "provider_options": {name: value}}
    if place == "compiled":
        compiled = {"provider": provider, "options": {name: value}, "onnxruntime": "1.32.0"}
        content = MANIFEST | STATIC | {"compiled": compiled}
    write_json(tmp_path / names.MANIFEST, content)
    unknown = place == "target" and provider not in TARGETS
    with pytest.raises(IntegrityError, match="target is" if unknown else "export the model again") as refused:
        read_bundle(tmp_path)
    assert repr(provider if unknown else name) in str(refused.value)


def test_options_of_the_table_are_kept(tmp_path):
    given = {
        "qnn": {"htp_arch": "73", "soc_model": "43", "htp_performance_mode": "burst", "vtcm_mb": "8"},
        "openvino": {"device_type": "HETERO:GPU.1,CPU", "precision": "FP16", "num_of_threads": "4"},
        "cuda": {"device_id": "1", "gpu_mem_limit": str(8 << 30), "enable_cuda_graph": "1"},
        "webgpu": {"enableGraphCapture": "1", "storageBufferCacheMode": "bucket"},
        "coreml": {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine"},
    }
    assert given.keys() == {name for name, row in PROVIDERS.items() if row.manifest_options}
    for target, options in given.items():
        write_json(tmp_path / names.MANIFEST, MANIFEST | {"target": target, "provider_options": options})
        assert read_bundle(tmp_path).manifest.provider_options == options
        assert in_manifest(target, options) == options
        assert not_kept(target, options) == ""


def test_options_that_are_not_kept_are_named():
    given = {"htp_arch": "75", "backend_path": "libQnnHtp.so", "soc_model": "-1"}
    assert in_manifest("qnn", given) == {"htp_arch": "75"}
    assert "does not keep the provider options backend_path, soc_model" in not_kept("qnn", given)


def test_the_page_on_the_format_has_every_option_and_defaults_may_be_set():
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    for provider, row in PROVIDERS.items():
        assert in_manifest(provider, row.options) == row.options  # the defaults may be set
        listed = ", ".join(f"`{name}`" for name in row.manifest_options)
        assert not listed or f"| `{provider}` | {listed} |" in page
