"""What `check` says of a bundle whose files are broken one by one.

That the programs really do what is claimed here was seen by running them on folders broken in these ways.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pastkey.__main__ import main
from pastkey.contract import names

from .editing import edit, edit_graph, record, verdicts

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


config = partial(edited, names.CONFIG)
genai = partial(edited, names.GENAI_CONFIG)


def graph(change: Callable[[onnx.GraphProto], object]) -> Callable[[Path], None]:
    return lambda folder: edit_graph(folder, change)


def without(*files: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return remove


def no_first_present(graph: onnx.GraphProto) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == names.present_key(0)))


# name: (what is done to the files, programs that then do not load it, those that only warn, and the words for both)
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...], str]] = {
    "class unknown to genai": (
        edited(names.TOKENIZER_CONFIG, tokenizer_class="BloomTokenizer"), (), (GENAI,), "BloomTokenizer",
    ),
    "another end": (
        edited(names.GENERATION_CONFIG, eos_token_id=[2, 3]), (), (OPTIMUM, *JS), "does not stop at the EOS token 1",
    ),
    "vocabulary": (genai("model", vocab_size=60), (GENAI,), (), "vocab_size 60; the graph has logits of 61"),
    "no config.json": (without(names.CONFIG), (OPTIMUM, *JS), (), "config.json is missing"),
    "unknown type": (config(model_type="mine"), (OPTIMUM, *JS), (), "model_type 'mine'"),
    "too few layers": (config(num_hidden_layers=1), JS, (), "num_hidden_layers 1; the graph has the cache of 2"),
    "no present": (graph(no_first_present), ("pastkey", OPTIMUM, *JS), (), "has no output 'present.0.key'"),
    "no graph": (without("onnx/model_quantized.onnx"), ALL, (), "onnx/model_quantized.onnx is missing"),
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


def test_the_command_prints_one_json_object(bundle, capsys):
    assert main(["check", str(bundle), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bundle"] == str(bundle)
    assert list(content["programs"]) == list(ALL)
    assert set(content["programs"]["optimum"]) == {"loads", "how", "reasons", "warnings"}
    assert content["programs"]["optimum"]["loads"] is True
