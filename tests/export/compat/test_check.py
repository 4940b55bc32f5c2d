"""What `check` says of a bundle whose files are broken one by one.

That the programs really do what is claimed here was seen by running them on folders broken in these ways.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.contract.bundle import read_bundle
from pastkey.errors import IntegrityError, MissingFileError
from pastkey.export.compat.bundle_view import read_bundle_view
from pastkey.export.compat.check import check
from pastkey.precisions import PRECISIONS

from .editing import edit, edit_graph, graph_input, record, verdicts

ALL = (
    "pastkey", "onnxruntime", "onnxruntime-genai", "optimum", "transformers.js in Node", "transformers.js in a browser",
)  # fmt: skip
GENAI, OPTIMUM, NODE, BROWSER = ALL[2:]
JS = (NODE, BROWSER)


# --- a bundle to break --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(exported, tmp_path_factory):
    """An int8 bundle of grouped queries with a tokenizer, whose prompts begin with BOS."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    shutil.copytree(exported("llama", "int8").bundle.path, folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate("abcdefgh", 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / names.TOKENIZER))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
    edit(folder, names.GENERATION_CONFIG, lambda c: c.update(eos_token_id=1))
    edit(folder, names.GENAI_CONFIG, lambda c: c["model"].update(eos_token_id=1, bos_token_id=0))
    edit(folder, names.MANIFEST, lambda c: c.update(bos_token_id=0, eos_token_ids=[1]))
    record(folder)
    return folder


@pytest.fixture
def bundle(whole, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


# --- a whole one --------------------------------------------------------------------------------------------------
def test_every_program_loads_what_export_writes(whole):
    found = verdicts(whole)
    assert tuple(found) == ALL
    assert all(verdict.loads for verdict in found.values())
    assert {program: len(verdict.warnings) for program, verdict in found.items()} == {
        "pastkey": 0, "onnxruntime": 2, GENAI: 1, OPTIMUM: 1, NODE: 1, BROWSER: 1,
    }  # fmt: skip
    assert "update_options" in found[GENAI].warnings[0]  # the BOS token
    assert all("--graph standard" in found[program].warnings[0] for program in (OPTIMUM, *JS))  # left padding
    assert "file_name='model_quantized.onnx'" in found[OPTIMUM].how
    assert "dtype: 'q8'" in found[NODE].how


def test_a_standard_graph_takes_any_padding(exported):
    found = verdicts(exported("head_size_10_context_11").bundle.path)
    assert all(verdict.loads for verdict in found.values())
    texts = [text for verdict in found.values() for text in verdict.warnings]
    assert texts
    assert all("ids only" in text for text in texts)


@pytest.mark.slow
def test_no_program_but_pastkey_and_plain_onnxruntime_knows_keys_and_values_of_two_sizes(exported):
    found = verdicts(exported("wider_values_context_2").bundle.path)
    assert [program for program, verdict in found.items() if verdict.loads] == ["pastkey", "onnxruntime"]
    assert "heads of size 8 for keys and 12 for values" in found[GENAI].reasons[0]
    for program in (OPTIMUM, *JS):
        assert "no model type has this graph's cache, use pastkey or plain onnxruntime" in found[program].reasons[0]


# --- broken ones --------------------------------------------------------------------------------------------------
def edited(file: str, *place: str, **changes: Any) -> Callable[[Path], None]:
    """Sets keys of what `file` has at `place`; ... removes a key."""

    def change(content: Any) -> None:
        for key in place:
            content = content[key]
        for key, value in changes.items():
            content.pop(key, None)
            if value is not ...:
                content[key] = value

    return lambda folder: edit(folder, file, change)


tokenizer = partial(edited, names.TOKENIZER)
tokenizer_config = partial(edited, names.TOKENIZER_CONFIG)
config = partial(edited, names.CONFIG)
javascript = partial(edited, names.CONFIG, "transformers.js_config")
generation = partial(edited, names.GENERATION_CONFIG)
genai = partial(edited, names.GENAI_CONFIG)


def graph(change: Callable[[onnx.GraphProto], object]) -> Callable[[Path], None]:
    return lambda folder: edit_graph(folder, change)


def without(*files: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return remove


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def name_axis(axis: int, name: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        for value in graph.input:
            if value.name.startswith("past"):
                value.type.tensor_type.shape.dim[axis].dim_param = name

    return change


def one_more_input(graph: onnx.GraphProto) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("num_beams", onnx.TensorProto.INT64, []))


def int32_ids(graph: onnx.GraphProto) -> None:
    graph_input(graph, names.INPUT_IDS).type.tensor_type.elem_type = onnx.TensorProto.INT32


def no_positions(graph: onnx.GraphProto) -> None:
    graph.input.remove(graph_input(graph, names.POSITION_IDS))


def int8_cache(graph: onnx.GraphProto) -> None:
    for value in graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8


def no_first_present(graph: onnx.GraphProto) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == names.present_key(0)))


WORDS = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "a"}
# name: (what is done to the files, programs that then do not load it, those that only warn, and the words for both)
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...], str]] = {
    # the tokenizer
    "no add_bos_token": (tokenizer_config(add_bos_token=...), (), JS, '"add_bos_token": true'),
    "class with a BOS token of its own": (
        both(tokenizer(post_processor=None), tokenizer_config(tokenizer_class="LlamaTokenizerFast")),
        (), (OPTIMUM,), "set add_bos_token to false",
    ),
    "class that leaves the BOS token out": (
        tokenizer_config(tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=True),
        (), (OPTIMUM,), "set add_bos_token to true",
    ),
    "no tokenizer_class": (tokenizer_config(tokenizer_class=...), (), (OPTIMUM,), "has no tokenizer_class"),
    "class of transformers 5": (tokenizer_config(tokenizer_class="TokenizersBackend"), (), (OPTIMUM,), "4.57"),
    "class unknown to genai": (tokenizer_config(tokenizer_class="BloomTokenizer"), (), (GENAI,), "BloomTokenizer"),
    "token_type_ids": (tokenizer_config(model_input_names=...), (), (OPTIMUM,), "token_type_ids"),
    "word level": (tokenizer(model=WORDS), (), (GENAI,), "only BPE"),
    "unknown part": (tokenizer(pre_tokenizer={"type": "UnicodeScripts"}), (), JS, "pre_tokenizer 'UnicodeScripts'"),
    "unknown part in a sequence": (
        tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "UnicodeScripts"}]}),
        (), JS, "pre_tokenizer 'UnicodeScripts'",
    ),
    "no tokenizer": (
        without(names.TOKENIZER, names.TOKENIZER_CONFIG), (), ("pastkey", GENAI, OPTIMUM, *JS), "ids only",
    ),
    "chat template in a file": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}") and None,
        (), JS, "does not read chat_template.jinja",
    ),
    # generation_config.json
    "sampling": (generation(do_sample=True), (), (OPTIMUM, *JS), "draws at random"),
    "another end": (generation(eos_token_id=[2, 3]), (), (OPTIMUM, *JS), "does not stop at the EOS token 1"),
    "no generation_config.json": (without(names.GENERATION_CONFIG), (), (OPTIMUM, *JS), "is missing"),
    # genai_config.json
    "no genai_config.json": (without(names.GENAI_CONFIG), (GENAI,), (), "genai_config.json is missing"),
    "type": (genai("model", type="pastkey"), (GENAI,), (), 'write "decoder"'),
    "file": (genai("model", "decoder", filename="model.onnx"), (GENAI,), (), "names the graph 'model.onnx'"),
    "vocabulary": (genai("model", vocab_size=60), (GENAI,), (), "vocab_size 60; the graph has logits of 61"),
    "heads": (genai("model", "decoder", num_key_value_heads=4), (), (GENAI,), "2 layers of 4 heads of size 16"),
    "past": (genai("model", "decoder", "inputs", past_key_names="past.%d"), (GENAI,), (), "'past_key_values.0.key'"),
    "long search": (genai("search", max_length=400), (), (GENAI,), "more than the context_length 40"),
    "no search length": (genai("search", max_length=...), (), (GENAI,), "search.max_length is not set"),
    "no end": (genai("model", eos_token_id=...), (), (GENAI,), "does not stop at the EOS token 1"),
    # config.json
    "no config.json": (without(names.CONFIG), (OPTIMUM, *JS), (), "config.json is missing"),
    "config.json cut short": (
        lambda folder: (folder / names.CONFIG).write_text("{") and None, (OPTIMUM, *JS), (), "config.json is not valid",
    ),
    "unknown type": (config(model_type="mine"), (OPTIMUM, *JS), (), "model_type 'mine'"),
    "type unknown in JavaScript": (config(model_type="glm4", num_attention_heads=2, hidden_size=32), JS, (), "glm4"),
    "too few layers": (config(num_hidden_layers=1), JS, (), "num_hidden_layers 1; the graph has the cache of 2"),
    "width that is not heads times size": (config(hidden_size=48), (OPTIMUM,), (), "2 heads of size 12"),
    "type without grouped queries": (config(model_type="olmo2"), (OPTIMUM,), (), "heads from num_attention_heads"),
    "no heads": (config(num_attention_heads=...), (OPTIMUM,), (), "no num_attention_heads"),
    "half of the rope": (config(rope_parameters={"rope_theta": 1e5}), (), (OPTIMUM,), "write both"),
    "no dtype": (javascript(dtype=...), (), (NODE,), "pass { dtype: 'q8' }"),
    "another dtype": (javascript(dtype="fp16"), (), JS, "onnx/model_fp16.onnx, which it opens by default"),
    "weights missing from the list": (javascript(use_external_data_format={"model_quantized.onnx": 2}), JS, (), "_1"),
    # the graph
    "named head size": (
        graph(name_axis(3, "head_dim")), ("pastkey", *JS), (), "'past_sequence_length', 'head_dim')",
    ),
    "another name for the batch": (graph(name_axis(0, "rows")), JS, (), "any name but batch_size is 0"),
    "one more input": (graph(one_more_input), ("pastkey", GENAI, OPTIMUM, *JS), (), "the input 'num_beams'"),
    "int32 ids": (graph(int32_ids), ("pastkey", OPTIMUM, *JS), (), "input_ids is int32"),
    "no positions": (graph(no_positions), (), (GENAI, OPTIMUM, *JS), "takes no position_ids"),
    "int8 cache": (graph(int8_cache), (OPTIMUM,), (), "the graph's cache is int8"),
    "no present": (graph(no_first_present), ("pastkey", OPTIMUM, *JS), (), "has no output 'present.0.key'"),
    "no graph": (without("onnx/model_quantized.onnx"), ALL, (), "onnx/model_quantized.onnx is missing"),
    # the manifest
    "a newer onnxruntime": (
        lambda folder: edit(folder, names.MANIFEST, lambda c: c.update(min_onnxruntime="1.31.0")),
        (NODE,), (), "onnxruntime-node 1.30.0; the graph needs onnxruntime 1.31.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_file_is_named_to_the_programs_that_read_it(name, whole, bundle):
    change, stopped, warned, words = BROKEN[name]
    before = verdicts(whole)
    change(bundle)
    record(bundle)
    found = verdicts(bundle)
    assert tuple(program for program, verdict in found.items() if not verdict.loads) == stopped
    for program, verdict in found.items():
        new = [text for text in verdict.warnings if text not in before[program].warnings]
        if program in stopped:
            assert any(words in text for text in verdict.reasons) or program == "pastkey", verdict.reasons
        elif program in warned:
            assert any(words in text for text in new), new
        else:
            assert not new, f"{program}: {new}"


def test_undeclared_weights_stop_a_browser_and_only_warn_where_they_lie_beside_the_graph(bundle):
    javascript(use_external_data_format=...)(bundle)
    record(bundle)
    found = verdicts(bundle)
    assert "model_quantized.onnx_data are not declared" in found[BROWSER].reasons[0]
    assert found[NODE].loads
    assert any("from a hub it does not" in text for text in found[NODE].warnings)


def test_a_shared_buffer_is_for_the_fused_graph(exported, tmp_path):
    folder = Path(shutil.copytree(exported("head_size_10_context_11").bundle.path, tmp_path / "bundle"))
    genai("search", past_present_share_buffer=True)(folder)
    assert "past_present_share_buffer" in verdicts(folder)[GENAI].reasons[0]


def test_a_file_altered_after_the_export_stops_pastkey_alone(bundle):
    tokenizer_config(padding_side="left")(bundle)
    found = verdicts(bundle)
    assert [program for program, verdict in found.items() if not verdict.loads] == ["pastkey"]
    assert "tokenizer_config.json" in found["pastkey"].reasons[0]


def test_weights_cut_short_are_named_with_both_sizes(bundle):
    data = bundle / "onnx/model_quantized.onnx_data"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[: size // 2])
    found = verdicts(bundle)
    assert not any(verdict.loads for verdict in found.values())
    assert f"has {size // 2} bytes; the graph's weights fill {size} bytes" in found["onnxruntime"].reasons[0]


def _places(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*place, key)
            yield from _places(value, (*place, key))


@pytest.mark.parametrize("file", [names.CONFIG, names.GENERATION_CONFIG, names.GENAI_CONFIG, names.TOKENIZER_CONFIG])
def test_values_of_any_kind_are_judged_and_never_fail(file, bundle):
    whole = json.loads((bundle / file).read_text(encoding="utf-8"))
    for place in _places(whole):
        for odd in (None, True, -1, 0.5, "odd", ["odd"], {"odd": ["odd"]}):
            content = json.loads(json.dumps(whole))
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = odd
            (bundle / file).write_text(json.dumps(content), encoding="utf-8")
            assert tuple(verdicts(bundle)) == ALL


# --- no bundle, and the command -----------------------------------------------------------------------------------
def test_what_is_no_bundle_is_refused(bundle, tmp_path):
    with pytest.raises(MissingFileError, match="no such bundle"):
        check(tmp_path / "none")
    (bundle / PRECISIONS["int8"].graph).write_bytes(b"\x08nothing of a graph")
    with pytest.raises(IntegrityError, match="is not an ONNX graph"):
        check(bundle)
    assert main(["check", str(bundle)]) == 2


def test_the_command_prints_a_verdict_per_program(bundle, capsys):
    config(model_type="mine")(bundle)
    record(bundle)
    assert main(["check", str(bundle)]) == 0  # it informs
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split("  ") for line in lines if not line.startswith(" ")]
    assert [head[0] for head in heads] == list(ALL)
    assert [head[-1].strip() for head in heads] == ["loads"] * 3 + ["does not load"] * 3
    assert any(line.startswith("    reason: config.json has the model_type 'mine'") for line in lines)
    assert any(line.startswith("    warning: it silently gives other text") for line in lines)


def test_the_command_prints_one_json_object(bundle, capsys):
    assert main(["check", str(bundle), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bundle"] == str(bundle)
    assert list(content["programs"]) == list(ALL)
    assert set(content["programs"]["optimum"]) == {"loads", "how", "reasons", "warnings"}
    assert content["programs"]["optimum"]["loads"] is True


# --- what is read, and with what ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [names.TOKENIZER, names.TOKENIZER_CONFIG, names.GENERATION_CONFIG])
def test_a_file_that_the_manifest_does_not_list_is_not_read(name, bundle):
    manifest = json.loads((bundle / names.MANIFEST).read_text())
    del manifest["files"][name]
    (bundle / names.MANIFEST).write_text(json.dumps(manifest))
    view = read_bundle_view(read_bundle(bundle))
    found = {
        names.TOKENIZER: view.tokenizer,
        names.TOKENIZER_CONFIG: view.tokenizer_config,
        names.GENERATION_CONFIG: view.generation_config,
    }[name]
    assert found.content == {}
    assert f"{name} is not listed in pastkey.json" in str(found.problem)


def test_a_template_that_the_manifest_does_not_list_is_not_told_of(bundle):
    before = check(bundle)
    (bundle / names.CHAT_TEMPLATE).write_text("{{ messages }}")
    assert check(bundle) == before


def test_the_command_needs_onnx_and_neither_torch_nor_another_program(bundle):
    program = (
        "import sys\nfrom pastkey.__main__ import main\n"
        f"assert main(['check', {str(bundle)!r}]) == 0\n"
        "heavy = ('torch', 'onnxruntime', 'transformers', 'onnxscript', 'onnx_ir', 'safetensors', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], 'onnx' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "[] True\n"
