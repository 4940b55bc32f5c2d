"""The checks between a bundle's files and a session that runs: versions, providers, links, and the manifest's word."""

import importlib.metadata
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingExtraError, ProviderError, StartError
from pastkey.runtime import Engine, load
from pastkey.runtime.providers import open as opening
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as ep
from pastkey.runtime.providers.inference import OrtSession, RunFailedError
from pastkey.runtime.providers.session_options import WHOLE, set_options
from pastkey.values import parse_version

from ..links import linked_to_blobs


def with_manifest(bundle, **fields):
    return replace(bundle, manifest=replace(bundle.manifest, **fields))


OTHER = {  # the manifest's fields, the error and its words
    "another head size": (
        lambda m: {"layers": (m.layers[0], KVGeometry(2, 16, 24))}, IntegrityError,
        r"'past_key_values.1.value' is \(B, 2, P1, 16\).*\(batch_size, 2, past_sequence_length, 24\) in the manifest",
    ),
    "another vocabulary": (
        lambda m: {"vocab_size": 38}, IntegrityError, r"'logits' is \(B, N, 37\) .*\(batch_size, sequence_length, 38\)"
    ),
    "fewer layers": (lambda m: {"layers": m.layers[:1]}, IntegrityError, r"has the tensor '(present|past_key_values)"),
    "more layers": (lambda m: {"layers": m.layers * 2}, IntegrityError, r"has no tensor '(present|past_key_values)"),
    "a newer onnxruntime": (
        lambda m: {"min_onnxruntime": "99.1.0"}, MissingExtraError,
        r"needs onnxruntime 99\.1\.0.*pip install --upgrade onnxruntime",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), OTHER.values(), ids=OTHER)
def test_a_manifest_of_another_graph_is_refused(bundle, change, error, words):
    with pytest.raises(error, match=words):
        Engine(with_manifest(bundle, **change(bundle.manifest)))


def test_another_graph_file_is_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / "b")
    for content, words in (
        (b"no graph at all", r"onnxruntime .* cannot load .*pastkey\.onnx"),
        (bundle.all_logits_graph.read_bytes(), r"pastkey\.onnx has no tensor 'logits_start'"),
    ):
        (copy / names.LAST_LOGITS_GRAPH).write_bytes(content)
        with pytest.raises(IntegrityError, match=words):
            Engine(replace(bundle, path=copy))
    (copy / "onnx" / "further.onnx").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"further\.onnx is not listed in pastkey\.json"):
        open_bundle(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_path_that_is_no_text_is_told(fused_bundle, tmp_path):
    copy = shutil.copytree(fused_bundle.path, tmp_path / os.fsdecode(b"b\xff"))
    with pytest.raises(InputError, match="is not UTF-8, and onnxruntime supports no other path: rename the folder"):
        Engine(open_bundle(copy))


WEBGPU_FAILS = ort.OrtError[0]("Failed to finalize the graph. Code: 1002\nat line 7")
FAILED_STARTS = [  # the bundle's target, the provider, onnxruntime's exception, the error and its words
    ("webgpu", "webgpu", WEBGPU_FAILS, ProviderError,
     r"Code: 1002; export the model again if an older pastkey wrote this bundle, or use the provider 'cpu'"),
    ("cpu", "webgpu", WEBGPU_FAILS, ProviderError,
     "Code: 1002; export the model again with --target webgpu, or use the provider 'cpu'; allow_fallback=True, or"),
    ("cpu", "webgpu", RuntimeError("No supported adapters"), StartError,
     "could not start the execution provider 'webgpu'.*; ask for one .*: cpu"),
    ("cpu", "cpu", ort.OrtError[0]("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : initialization: std::bad_alloc"),
     MemoryError, r"too little memory to load .*pastkey\.onnx: .*bad_alloc"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "provider", "raised", "error", "words"), FAILED_STARTS)
def test_a_failed_start_is_refused_with_a_remedy(standard_bundle, monkeypatch, target, provider, raised, error, words):
    def fails(*_, **__):
        raise raised

    monkeypatch.setattr(ep, "available", lambda: ["WebGpuExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(opening, "OrtSession", fails)
    with pytest.raises(error, match=words):
        Engine(with_manifest(standard_bundle, target=target), providers=provider)


def test_threads(bundle):
    session = Engine(bundle, threads=2)
    assert session.graph.threads == session.onnx.get_session_options().intra_op_num_threads == 2
    assert Engine(bundle).graph.threads == opening.default_threads()
    for threads in (0, -1, 100_000):
        with pytest.raises(InputError, match=f"threads is {threads}; it must be 1 to "):
            Engine(bundle, threads=threads)


def test_a_download_cache_of_links_is_loaded(tiny, make_bundle, tmp_path):
    """Weights next to the graph."""
    if ort.onnxruntime.__version__ == "1.24.1":
        pytest.skip("this release takes no weights that are links")
    source = make_bundle(tiny, "fused", data_file=names.weights_file("model.onnx"))
    bundle = open_bundle(linked_to_blobs(source.path, tmp_path), verify=True)
    ids = [3, 1, 4, 1, 5]
    found = Engine(bundle, graph="all_logits", threads=1).forward([ids])[0]
    np.testing.assert_allclose(found, tiny(ids), atol=1e-4)


def test_operators_are_counted_by_provider(fused_bundle):
    assert opening.operators_of(Engine(fused_bundle, threads=1).onnx)[ep.CPU]["GroupQueryAttention"] == 2


def test_a_run_that_fails_names_the_graph(standard_bundle):
    session = Engine(standard_bundle, graph="all_logits").onnx
    assert isinstance(session, OrtSession)
    wrong = {value.name: np.zeros(len(value.shape) * [1], np.int8) for value in session.get_inputs()}
    with pytest.raises(RunFailedError, match=r"cannot run .*model\.onnx") as caught:
        session.run(None, wrong)
    assert isinstance(caught.value, IntegrityError)
    assert isinstance(caught.value, ort.RunError)  # who asks for onnxruntime's own errors still gets them
    with pytest.raises(RunFailedError, match="cannot run"):
        session.run_with_iobinding(session.io_binding())


# --- session options of a user ------------------------------------------------------------------------------------
GIVEN = {
    "enable_cpu_mem_arena": False,
    "enable_mem_pattern": "0",
    "execution_mode": "ORT_PARALLEL",
    "graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "inter_op_num_threads": "2",
    "logid": "mine",
    "session.force_spinning_stop": "0",
    "session.use_env_allocators": "1",
}


def test_attributes_and_entries_are_set_over_pastkeys_defaults(bundle):
    options = Engine(bundle, threads=2, session_options=GIVEN).onnx.get_session_options()
    assert options.enable_cpu_mem_arena is options.enable_mem_pattern is False
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert (options.inter_op_num_threads, options.intra_op_num_threads, options.logid) == (2, 2, "mine")
    assert options.get_session_config_entry("session.force_spinning_stop") == "0"
    assert options.get_session_config_entry("session.use_env_allocators") == "1"
    plain = Engine(bundle, threads=2).onnx.get_session_options()
    assert plain.inter_op_num_threads == 1
    assert plain.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_pickled_model_keeps_its_session_options(speaking_bundle, lm):
    expected = lm.generate("abc", max_new_tokens=8).ids
    model = load(speaking_bundle.path, threads=1, session_options=GIVEN)
    for one in (model, pickle.loads(pickle.dumps(model))):
        assert one.generate("abc", max_new_tokens=8).ids == expected
        assert one.require_open().onnx.get_session_options().logid == "mine"


SETTINGS = [
    (WHOLE, "0", "is set by pastkey: leave it out; .* --allow-fallback"),
    ("intra_op_num_threads", 2, "is set by pastkey: leave it out; give threads=N"),
    ("session.model_external_initializers_file_folder_path", "x", "is set by pastkey: .* next to their graph"),
    ("zzz", True, r"does not accept the session option zzz with the value True \(.* has no attribute 'zzz'\)$"),
    ("add_initializer", None, "session option add_initializer .* read-only"),
    ("enable_mem_pattern", "yes", "enable_mem_pattern with the value 'yes' .*; the default is True"),
    ("inter_op_num_threads", "many", "inter_op_num_threads with the value 'many' .*; the default is 1"),
    ("inter_op_num_threads", 2**40, "incompatible function arguments"),
    ("graph_optimization_level", "all", "with the value 'all' .*; the default is .*ORT_ENABLE_ALL"),
    ("session.use_env_allocators", True, "session.use_env_allocators with the value True"),
    ("session." + "x" * 2000, "1", "onnxruntime .* does not accept the session option session.xxx"),
]


@pytest.mark.parametrize(("name", "value", "words"), SETTINGS)
def test_session_options_that_are_refused(bundle, name, value, words):
    with pytest.raises(InputError, match=words):
        Engine(bundle, session_options={name: value})


def test_a_path_is_a_text(tmp_path):
    options = onnxruntime.SessionOptions()
    set_options(options, {"optimized_model_filepath": tmp_path / "optimized.onnx"})
    assert options.optimized_model_filepath == str(tmp_path / "optimized.onnx")


# --- onnxruntime, as it is found here -------------------------------------------------------------------------------
@pytest.fixture
def install(monkeypatch):
    """install(WHEELS): as if these packages and versions were installed."""

    def here(wheels):
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": list(wheels)})
        monkeypatch.setattr(importlib.metadata, "version", wheels.__getitem__)

    return here


def test_a_release_that_cannot_run_bundles_is_refused_with_the_command(install):
    install({"onnxruntime-gpu": "1.23.2"})
    with pytest.raises(MissingExtraError, match=r"older than 1\.24\.1.* type  pip install --upgrade onnxruntime-gpu "):
        ort.require_supported("1.23.2")
    for version in ("1.24.1", "2.0.0"):
        ort.require_supported(version)


INSTALLED = [
    ({"onnxruntime-openvino": "1.24.1"}, "1.24.1", "onnxruntime-openvino"),
    ({"onnxruntime": "1.32.0", "onnxruntime-webgpu": "1.27.0"}, "1.27.0", "onnxruntime-webgpu"),  # over the other
    ({"onnxruntime": "1.27.0", "onnxruntime-webgpu": "1.25.1"}, "1.27.0", "onnxruntime"),
    ({}, "1.27.0", "onnxruntime"),  # built from source
]


@pytest.mark.parametrize(("installed", "here", "first"), INSTALLED)
def test_the_wheel_that_answers_is_the_one_to_upgrade(installed, here, first, install, monkeypatch):
    install(installed)
    monkeypatch.setattr(ort.onnxruntime, "__version__", here)
    assert ort.upgrade_command() == f"pip install --upgrade {first}"


TELEMETRY = [("import onnxruntime; os.environ[name] = '0'", 1), ("os.environ.pop(name)", 0)]


@pytest.mark.parametrize(("before", "warnings"), TELEMETRY)
@pytest.mark.skipif(parse_version(ort.onnxruntime.__version__) < ort.TELEMETRY_SINCE, reason="it has none")
def test_telemetry_that_cannot_be_turned_off_any_more_is_said_once(before, warnings):
    program = (
        f"import os, warnings; name = 'ORT_DISABLE_TELEMETRY'; {before}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import pastkey.runtime.providers.ort, pastkey.runtime.engine.engine\n"
        "print([(w.category.__name__, str(w.message)) for w in caught if 'telemetry' in str(w.message)])\n"
    )
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.count("RuntimeWarning") == done.stdout.count("set ORT_DISABLE_TELEMETRY=1") == warnings


# None makes the import fail; a half uninstalled wheel leaves an empty module.
@pytest.mark.parametrize("stub", ["None", "types.ModuleType('onnxruntime')"])
def test_without_onnxruntime_the_command_to_type_is_named(stub):
    program = f"import sys, types\nsys.modules['onnxruntime'] = {stub}\nfrom pastkey.__main__ import main\n"
    program += "sys.exit(main(['devices']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install '.[cpu]'" in done.stderr
