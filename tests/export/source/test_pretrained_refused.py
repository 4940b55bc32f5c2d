"""Hugging Face folders that cannot be exported, each with its one sentence; and those with code of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.errors import ContractError, ResourceError
from pastkey.export import export, resources
from pastkey.export.source.open import open_source

from ..tiny_llama import TRANSFORMERS_4, llama, sizes

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


def change(folder: Path, **entries: Any) -> Path:
    """Writes entries of config.json over; None takes one out."""
    file = folder / names.CONFIG
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


# --- bad folders --------------------------------------------------------------------------------------------------
def shards(folder: Path) -> tuple[Path, dict[str, str], list[str]]:
    """A folder in shards: its index, which tensor is in which of them, and their names."""
    llama().save_pretrained(folder, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return index, listed, sorted(set(listed.values()))


def test_a_shard_that_lacks_what_the_index_names(tmp_path, refusal):
    index, listed, (first, second, *_) = shards(tmp_path / "model")
    shutil.copy(index.parent / first, index.parent / second)
    lacking = next(name for name, shard in listed.items() if shard == second)
    sentence = f"{index} says that {second} holds {lacking!r}, and it does not: that file is another model's; fetch it"
    assert refusal(index.parent) == f"{sentence} again"


def test_shards_without_their_index(tmp_path, refusal):
    index, _, (first, *_) = shards(tmp_path / "model")
    index.unlink()
    sentence = f"{index.parent} has the shard {first} and no {index.name}, which says what lies in which shard: fetch"
    assert refusal(index.parent) == f"{sentence} that file too"


def test_two_shards_with_a_tensor_of_one_name(tmp_path, refusal):
    index, listed, (first, second, *_) = shards(tmp_path / "model")
    twice = next(name for name, shard in listed.items() if shard == first)
    tensors = {f: safetensors.torch.load_file(index.parent / f) for f in (first, second)}
    both = tensors[second] | {twice: tensors[first][twice]}
    safetensors.torch.save_file(both, index.parent / second, metadata={"format": "pt"})
    sentence = f"{index.parent} has two tensors {twice!r}, in {first} and in {second}: one of the two files is another"
    assert refusal(index.parent) == f"{sentence} model's; fetch them again"


def test_a_tensor_of_an_unknown_type(llama_folder, refusal):
    file = llama_folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    assert "in 'X32', which is not a known type: expected F32, F16, BF16 or another of safetensors" in refusal(
        file.parent
    )


# transformers 4 does not tell the shape that it found.
SHAPE = "has another shape" if TRANSFORMERS_4 else "has shape ("


def test_a_tensor_without_numbers(llama_folder, refusal):
    file = llama_folder / names.WEIGHTS
    tensors = safetensors.torch.load_file(file)
    empty = {"model.norm.weight": tensors["model.norm.weight"][:0], "unused": torch.zeros(0)}
    safetensors.torch.save_file(tensors | empty, file, metadata={"format": "pt"})
    assert "the weight model.norm.weight of" in (sentence := refusal(file.parent))
    assert SHAPE in sentence
    assert "and its config.json asks for (64,)" in sentence


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 takes the embedding")
def test_tied_weights_that_are_saved_twice_and_differ(tmp_path, refusal):
    folder = tmp_path / "model"
    llama(tie_word_embeddings=False).save_pretrained(folder)
    sentence = refusal(change(folder, tie_word_embeddings=True))
    assert sentence.startswith(f"{folder} holds an output head beside the embedding, with other numbers")


def test_weights_that_are_only_pickled_come_with_a_command_that_converts_them(
    saved_llama, llama_folder, tmp_path, refusal
):
    folder = llama_folder.rename(tmp_path / 'it\'s $(touch here) "mine"')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    sentence = refusal(folder)
    assert "has its weights only as pytorch_model.bin, a pickle" in sentence
    command = sentence.split("convert it with ")[1].split(" and export that folder")[0]
    command = command.replace("python", sys.executable, 1)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "here").exists()
    converted = open_source(f"{folder}-safetensors")
    assert torch.equal(converted.module.model.lm_head.weight, model.lm_head.weight)  # type: ignore[arg-type]
    assert converted.tokenizer == open_source(saved_llama).tokenizer


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"hidden_size": 32, "head_dim": 8}, (SHAPE, "and its config.json asks for (", "another model's")),
        ({"num_hidden_layers": 1}, ("the weight 'model.layers.1.", "LlamaForCausalLM of its config.json has no layer")),
        ({"num_hidden_layers": 3}, ("has no weight 'model.layers.2.", "and 8 more, which LlamaForCausalLM needs")),
        pytest.param(
            {"model_type": None, "architectures": None},
            ("transformers", "cannot load", "model_type"),
            marks=pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 guesses by the folder's name"),
        ),
        ({"model_type": "nonesuch"}, ("transformers", "cannot load", "nonesuch")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantized already (quantization_config says gptq)",)),
    ],
)
def test_a_configuration_that_does_not_fit(llama_folder, refusal, entries, words):
    sentence = refusal(change(llama_folder, **entries))
    for word in words:
        assert word in sentence
    assert str(llama_folder) in sentence or llama_folder.name in sentence or "context" in sentence


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_configuration_that_is_not_json(llama_folder, refusal, content):
    (llama_folder / names.CONFIG).write_text(content)
    assert str(llama_folder / names.CONFIG) in refusal(llama_folder)


@pytest.mark.parametrize("kept", [10, 100_000])
def test_weights_that_are_cut_short(llama_folder, refusal, kept):
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    sentence = refusal(llama_folder)
    assert f"{file} is cut short or damaged" in sentence
    assert "fetch it again" in sentence


def test_a_missing_shard(tmp_path, refusal):
    llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    sentence = refusal(tmp_path / "model")
    assert f"lacks {lost.name}, which model.safetensors.index.json names: fetch what is missing" in sentence


class Opens:
    """What a pickle runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def shard(folder: Path, name: str) -> Path:
    """Puts the weights of `folder` into the file `name`, which an index lists, and a pickle there for any other."""
    weights = folder / names.WEIGHTS
    with safetensors.safe_open(weights, "pt") as opened:
        listed = dict.fromkeys(opened.keys(), name)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        weights.rename(target)
    else:
        weights.unlink()
        torch.save({"mark": Opens(folder / "was-run")}, target)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.fixture
def opened():
    """The files that Python opens meanwhile."""
    seen: set[Path] = set()
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:  # it can never be removed again
        if watching and event == "open" and isinstance(arguments[0], str):
            seen.add(Path(os.path.realpath(arguments[0])))

    sys.addaudithook(hook)
    yield seen
    watching = False


@pytest.mark.parametrize("name", ["evil.bin", "../evil.bin", "../outside.safetensors", "sub/model.safetensors"])
def test_an_index_that_names_anything_but_safetensors_beside_it(name, llama_folder, refusal, opened):
    named = shard(llama_folder, name).resolve()
    opened.clear()
    sentence = refusal(llama_folder)
    assert f"model.safetensors.index.json names the weights '{name}': expected .safetensors files" in sentence
    assert llama_folder.resolve() / names.CONFIG in opened
    assert named not in opened
    assert not (llama_folder / "was-run").exists()


def test_an_index_that_names_safetensors_beside_it_is_taken(llama_folder):
    shard(llama_folder, "model-00001-of-00001.safetensors")
    assert open_source(llama_folder).tokenizer is not None


def test_an_index_without_its_map(llama_folder, refusal):
    (llama_folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "index.json has no weight_map" in refusal(llama_folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "sub/x.safetensors.index.json", "../outside.safetensors", 3])
def test_weights_that_a_configuration_names_elsewhere(name, llama_folder, refusal, opened):
    pickle = llama_folder.resolve() / "adapter_model.bin"
    torch.save({"mark": Opens(llama_folder / "was-run")}, pickle)
    opened.clear()
    change(llama_folder, transformers_weights=name)
    assert f"config.json names the weights {name!r}: expected a .safetensors file beside it" in refusal(llama_folder)
    assert pickle not in opened


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{"])
def test_a_header_of_weights_that_is_no_json(header, llama_folder, refusal):
    weights = len(header).to_bytes(8, "little") + header + b"0" * 8
    (llama_folder / names.WEIGHTS).write_bytes(weights)
    assert "model.safetensors is cut short or damaged, its header is not JSON" in refusal(llama_folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**40},
        {"max_position_embeddings": 2**40},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
)
def test_a_configuration_of_more_than_the_files_hold(entries, llama_folder, refusal):
    change(llama_folder, **entries)
    sentence = refusal(llama_folder)
    assert "config.json asks for more than the" in sentence
    assert "one of the two is another model's" in sentence


def test_the_weights_are_those_of_the_files_that_transformers_reads(llama_folder):
    told: list[int] = []
    shutil.copy(llama_folder / names.WEIGHTS, llama_folder / "consolidated.safetensors")
    model = open_source(change(llama_folder, dtype="bfloat16"), before_loading=lambda weights, *_: told.append(weights))
    assert told == [sum(parameter.numel() for parameter in model.module.parameters())]


# --- links --------------------------------------------------------------------------------------------------------
LINKED = (names.CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


@pytest.mark.parametrize("name", [*LINKED, "additional_chat_templates/tool_use.jinja"])
def test_a_link_that_leads_out_of_the_folder(name, llama_folder, refusal, opened):
    file = llama_folder / name
    secret = llama_folder.parent / "secret"
    if file.exists():
        file.rename(secret)
    else:
        secret.write_text("a key")
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(secret)
    opened.clear()
    sentence = refusal(llama_folder)
    assert sentence == f"{file} leads out of {llama_folder}, to {secret}: copy the file itself into the folder"
    assert secret.resolve() not in opened


def test_a_snapshot_of_the_hub_cache_is_a_source(llama_folder, tmp_path):
    """Each file a link to a blob beside the snapshots, as a download makes it; one is a file of its own."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    (llama_folder / "additional_chat_templates").mkdir()
    (llama_folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    for number, file in enumerate(sorted(path for path in llama_folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(llama_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file.name == names.TOKENIZER:
            file.rename(link)
            continue
        file.rename(blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    source = open_source(snapshot)
    assert source.tokenizer is not None
    assert {"default", "tool_use"} <= {entry["name"] for entry in source.tokenizer_config["chat_template"]}


def test_a_folder_that_is_itself_a_link_is_a_source(llama_folder, tmp_path):
    (tmp_path / "named").symlink_to(llama_folder)
    assert open_source(tmp_path / "named").name == "tiny-llama"


def test_an_encoder_decoder(tmp_path, refusal):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**small)).save_pretrained(tmp_path / "t5")
    assert "holds an encoder-decoder (t5): only decoders can be exported" in refusal(tmp_path / "t5")


def test_a_state_space_model(tmp_path, refusal):
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=2)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    told = refusal(tmp_path / "mamba")
    assert "some layers of" in told
    assert "(MambaForCausalLM" in told
    assert "keep another state than keys and values, as linear attention and state-space models do" in told


def test_a_hybrid_is_refused_by_the_layers_that_it_has_and_not_by_its_class():
    """Dense Granite 4.0 is of a class that can have Mamba's layers, and has attention in every layer."""
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"intermediate_size": 16, "shared_intermediate_size": 16, "vocab_size": 40, "num_local_experts": 0}
    small |= {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "max_position_embeddings": 24}

    def opened(*layers: str) -> int:
        config = transformers.GraniteMoeHybridConfig(layer_types=[*layers], **small)
        return open_source(transformers.GraniteMoeHybridForCausalLM(config)).context_length

    assert opened("attention", "attention") == 24
    with pytest.raises(ContractError, match="keep another state than keys and values"):
        opened("mamba", "attention")


def test_a_model_without_a_head_for_language(tmp_path, refusal):
    transformers.LlamaModel(transformers.LlamaConfig(**sizes())).save_pretrained(tmp_path / "model")
    assert "has no weight 'lm_head.weight', which LlamaForCausalLM needs" in refusal(tmp_path / "model")


# --- resources ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("short", ["memory", "disk"])
def test_what_the_machine_has_not_is_said_before_loading(saved_llama, tmp_path, monkeypatch, short):
    def loads(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
    if short == "memory":
        monkeypatch.setattr(resources, "available_memory", lambda: 1 << 20)
    else:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=1 << 10))
    with pytest.raises(ResourceError, match=f"of {short} and"):
        export(saved_llama, tmp_path / "bundle", "fp32")
    assert list(tmp_path.iterdir()) == []


# --- a folder with code of its own --------------------------------------------------------------------------------
CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny-custom"

    def __init__(self, vocab_size=60, width=32, max_position_embeddings=40, **others):
        self.vocab_size, self.width, self.max_position_embeddings = vocab_size, width, max_position_embeddings
        super().__init__(**others)
"""
MODELING = """
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyConfig

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_position_embeddings, config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=None, **_):
        x = self.token(input_ids) + self.position(position_ids)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A folder whose model is Python code in it."""
    from safetensors.torch import save_file

    # transformers copies such code into its cache before it imports it.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    torch.manual_seed(0)
    shapes = {"token": (60, 32), "position": (40, 32), "qkv": (96, 32), "head": (60, 32)}
    weights = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    save_file(weights | {"qkv.bias": torch.zeros(96)}, folder / "model.safetensors", {"format": "pt"})
    auto = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyModel",
    }
    sizes = {"vocab_size": 60, "width": 32, "max_position_embeddings": 40}
    (folder / names.CONFIG).write_text(json.dumps({"model_type": "tiny-custom", "auto_map": auto, **sizes}))
    return folder


def test_code_of_a_folder_does_not_run_unasked(custom, refusal):
    (custom / "modeling_tiny.py").write_text("raise SystemExit('it ran')")
    sentence = refusal(custom)
    assert "brings Python code of its own (configuration_tiny.py, modeling_tiny.py)" in sentence
    assert "add --trust-remote-code" in sentence


def test_code_that_is_trusted_runs_and_is_named(custom, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", str(custom), "--out", str(out), "--precision", "fp32", "--trust-remote-code"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert f"run the Python code that {custom} brings: configuration_tiny.py, modeling_tiny.py" in said
    assert "auto_map" not in json.loads((out / names.CONFIG).read_text())
    assert main(["verify", str(out), str(custom), "--trust-remote-code"]) == 0
    assert "modeling_tiny.py" in capsys.readouterr().err


def test_a_link_to_nothing_is_told(llama_folder, tmp_path, refusal):
    """As in a cache that was fetched in part."""
    (llama_folder / names.TOKENIZER).unlink(missing_ok=True)
    (llama_folder / names.TOKENIZER).symlink_to(tmp_path / "nowhere")
    assert "tokenizer.json is a link to a file that is not there" in refusal(llama_folder)
