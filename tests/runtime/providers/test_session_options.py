"""Session options of a user's reach every session, or are one sentence."""

from __future__ import annotations

import pickle

import onnxruntime
import pytest

from pastkey.errors import InputError
from pastkey.runtime import Engine, load
from pastkey.runtime.providers.session_options import WHOLE, set_options

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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (WHOLE, "0", "is set by pastkey: leave it out; .* --allow-fallback"),
        ("intra_op_num_threads", 2, "is set by pastkey: leave it out; give threads=N"),
        ("session.model_external_initializers_file_folder_path", "x", "is set by pastkey: .* beside their graph"),
        ("zzz", True, r"does not take the session option zzz with the value True \(.* has no attribute 'zzz'\)$"),
        ("add_initializer", None, "session option add_initializer .* read-only"),
        ("enable_mem_pattern", "yes", "enable_mem_pattern with the value 'yes' .*; the default is True"),
        ("inter_op_num_threads", "many", "inter_op_num_threads with the value 'many' .*; the default is 1"),
        ("inter_op_num_threads", 2**40, "incompatible function arguments"),
        ("graph_optimization_level", "all", "with the value 'all' .*; the default is .*ORT_ENABLE_ALL"),
        ("session.use_env_allocators", True, "session.use_env_allocators with the value True"),
        ("session." + "x" * 2000, "1", "onnxruntime .* does not take the session option session.xxx"),
    ],
)
def test_session_options_that_are_refused(bundle, name, value, words):
    with pytest.raises(InputError, match=words):
        Engine(bundle, session_options={name: value})


def test_a_path_is_a_text(tmp_path):
    options = onnxruntime.SessionOptions()
    set_options(options, {"optimized_model_filepath": tmp_path / "optimized.onnx"})
    assert options.optimized_model_filepath == str(tmp_path / "optimized.onnx")
