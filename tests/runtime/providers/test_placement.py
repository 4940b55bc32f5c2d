import dataclasses

import pytest

from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS
from pastkey.runtime.providers import placement as providers

CPU = providers.Placement((("CPUExecutionProvider", {}),))
NEVER_FUSED = [known.name for known in PROVIDERS.values() if "fused" not in known.graphs]
QNN = {"backend_type": "htp", "htp_arch": "75", "soc_model": "57"}


@pytest.fixture
def here(monkeypatch):
    """here(*NAMES): as if these providers were on this machine."""
    return lambda *names: monkeypatch.setattr(providers, "available", lambda: [*names, "CPUExecutionProvider"])


@pytest.fixture
def wheels(monkeypatch):
    """wheels(*NAMES): as if these packages were installed."""
    return lambda *names: monkeypatch.setattr(providers, "wheels", lambda: list(names))


@pytest.mark.parametrize("choice", [None, "cpu", "CPU", "CPUExecutionProvider", ["cpu"], ("cpu", {}), []])
def test_the_cpu_by_every_name(choice):
    assert providers.resolve(choice) == CPU
    assert providers.resolve(choice, target="portable") == CPU


def test_options_are_the_calls_then_those_of_the_target_then_the_providers_own(here):
    here("QNNExecutionProvider", "OpenVINOExecutionProvider")
    own = {"htp_arch": "73"}
    for choice, target, of_target, expected in (
        ("qnn", "cpu", {}, QNN),
        (None, "qnn", {}, QNN),
        (("qnn", {"htp_arch": "73", "more": "1"}), "cpu", {}, QNN | {"htp_arch": "73", "more": "1"}),
        (None, "qnn", own, QNN | {"htp_arch": "73"}),
        ("qnn", "qnn", own, QNN | {"htp_arch": "73"}),
        (("qnn", {"htp_arch": "79"}), "qnn", own, QNN | {"htp_arch": "79"}),
    ):
        found = providers.resolve(choice, target, "static", options_of_target=of_target)
        assert found.providers == (("QNNExecutionProvider", expected),)
    assert "htp_arch" not in providers.resolve("openvino", "qnn", "standard", options_of_target=own).providers[0][1]
    for missing in ("68", "99"):  # no float16, no such chip
        with pytest.raises(ProviderError, match=f"'qnn' has no htp_arch {missing}; it must be one of 69, 73"):
            providers.resolve(("qnn", {"htp_arch": missing}))
    with pytest.raises(ProviderError, match="'qnn' has no htp_arch 99; it must be one of"):
        providers.require_values(PROVIDERS["qnn"], {"htp_arch": "99"})


CHOICES = [
    ("cuda", {}, ["cuda", "cpu"]),
    (None, {"target": "cuda"}, ["cuda", "cpu"]),
    ("tensorrt", {"graph": "fused"}, ["tensorrt", "cpu"]),
    # One that is known to run whole graphs runs all of it, or is told that it need not.
    ("openvino", {}, ["openvino"]),
    (("openvino", {"device_type": "CPU"}), {}, ["openvino"]),
    (["openvino"], {}, ["openvino"]),
    ("openvino", {"graph": "fused"}, ["openvino"]),
    (None, {"target": "openvino"}, ["openvino"]),
    ("openvino", {"allow_fallback": True}, ["openvino", "cpu"]),
    (["openvino", "cpu"], {}, ["openvino", "cpu"]),
    # WebGPU runs a bundle that was made for it in parts, and no other.
    (None, {"target": "webgpu", "graph": "fused"}, ["webgpu", "cpu"]),
    ("webgpu", {"target": "webgpu", "graph": "standard"}, ["webgpu", "cpu"]),
    ("webgpu", {"target": "cpu", "graph": "fused"}, ["webgpu"]),
    ("webgpu", {"target": "cpu", "graph": "standard"}, ["webgpu"]),
    (None, {"target": "webgpu", "graph": "static"}, ["webgpu"]),
]


@pytest.mark.parametrize(("choice", "settings", "expected"), CHOICES)
def test_the_cpu_is_added_unless_the_whole_graph_must_run_elsewhere(choice, settings, expected, here):
    here(*(PROVIDERS[name].name for name in ("cuda", "tensorrt", "openvino", "webgpu")))
    placement = providers.resolve(choice, **settings)
    found = [providers.short_name(name) for name, _ in placement.providers]
    whole = expected[-1] != "cpu"
    assert (found, placement.whole, placement.tells) == (expected, whole, not whole)


def test_operators_left_to_the_cpu_are_counted():
    assert providers.counted({"Shape": 1}) == "1 operator (Shape)"
    many = {name: 8 - i for i, name in enumerate("ABCDEFG")}
    assert providers.counted(many) == "35 operators (A 8, B 7, C 6, D 5, E 4, F 3, ...)"


def test_wheels_over_one_another_are_named(here, wheels):
    assert providers.overlapping() == ""
    wheels("onnxruntime", "onnxruntime-webgpu")
    assert "the packages onnxruntime, onnxruntime-webgpu overwrite one another" in providers.overlapping()
    here()
    for name, words in (
        ("webgpu", "'webgpu' is not on this machine; here: cpu; it comes with pip uninstall"),
        ("openvino", r"onnxruntime-webgpu  and then  pip install onnxruntime-openvino$"),
    ):
        with pytest.raises(ProviderError, match=words):
            providers.resolve(name)


def test_the_command_that_installs_another_wheel(wheels):
    gpu, both = "pip install onnxruntime-gpu, with CUDA and cuDNN", ("onnxruntime-webgpu", "onnxruntime-gpu")
    for installed, name, expected in (
        (("onnxruntime",), "cuda", f"pip uninstall onnxruntime  and then  {gpu}"),
        (("onnxruntime",), "qnn", "pip install onnxruntime onnxruntime-qnn"),
        (("onnxruntime",), "coreml", "pip install onnxruntime on macOS"),
        (("onnxruntime",), "xnnpack", "onnxruntime built from source with --use_xnnpack"),
        # The other's files replaced those of the wanted one: pip would find it installed, and restore nothing.
        (both, "cuda", f"pip uninstall onnxruntime-webgpu onnxruntime-gpu  and then  {gpu}"),
        (
            both,
            "qnn",
            "pip uninstall onnxruntime-webgpu onnxruntime-gpu  and then  pip install onnxruntime onnxruntime-qnn",
        ),
    ):
        wheels(*installed)
        assert providers.what_brings(PROVIDERS[name]) == expected


def test_a_plugin_is_here_where_its_package_is(monkeypatch):
    assert "QNNExecutionProvider" not in providers.available()
    monkeypatch.setattr(providers, "_installed", lambda module: module == "onnxruntime_qnn")
    assert providers.available()[0] == "QNNExecutionProvider"
    assert providers.is_plugin("QNNExecutionProvider")
    with pytest.raises(ProviderError, match="of the package 'onnxruntime_qnn' could not be loaded"):
        providers.plugin_devices("QNNExecutionProvider")


REFUSED = [
    ("coreml", "cpu", r"'coreml' is not on this machine; here: .*cpu.*macOS"),
    (None, "webgpu", "the bundle was made for webgpu"),
    ("gpu9", "cpu", r"is unknown; here: .*; known are cpu, cuda, "),
    ("", "cpu", "is unknown"),
]


@pytest.mark.parametrize(("asked", "target", "words"), REFUSED)
def test_absent_and_unknown_providers_are_refused(asked, target, words):
    with pytest.raises(ProviderError, match=words):
        providers.resolve(asked, target)


@pytest.mark.parametrize("full", [*NEVER_FUSED, "NewExecutionProvider"])
def test_the_fused_graph_is_refused_where_it_was_not(full, here):
    here(full)
    sentence = "this bundle has the fused graph, which is not known to run on the execution provider '.*'"
    for choice in (full, [providers.short_name(full), "cpu"], (full, {"device": "0"})):
        with pytest.raises(ProviderError, match=f"{sentence}: use the provider 'cpu'"):
            providers.resolve(choice, graph="fused")
        assert providers.resolve(choice, graph="standard").providers[0][0] == full


ADVICE = [
    ("webgpu", {}, "--target webgpu --graph static --precision fp32"),
    ("webgpu", {"precision": "int8"}, "--target webgpu --graph standard --precision int8"),
    ("dml", {}, "--target cpu --graph standard --precision fp32"),
    ("webgpu", {"graph": "static"}, "report the device"),
]


@pytest.mark.parametrize(("name", "changes", "advice"), ADVICE)
def test_another_graph_is_of_the_same_model_in_the_same_precision(fused_bundle, name, changes, advice):
    assert advice in providers.other_graph(name, dataclasses.replace(fused_bundle.manifest, **changes))


def test_a_provider_that_did_not_start_is_refused():
    wanted = providers.Placement((("CUDAExecutionProvider", {}), *CPU.providers))
    providers.require_active(wanted, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="could not start the execution provider 'cuda'"):
        providers.require_active(wanted, ["CPUExecutionProvider"])
