"""Hugging Face folders that cannot be exported, and those with their own code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError, ResourceError
from pastkey.export import export, resources
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.export.source.stored_weights import MOST_POSITIONS

from ..tiny_llama import TRANSFORMERS_4
from .opening import Refused, Runs, change, link_out, write

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


# --- what is spoilt: functions of a folder, some of which return a file that nobody may open ------------------------
def config(**entries: Any) -> Any:
    return lambda folder: change(folder / names.CONFIG, **entries)


def tensors(folder: Path, changed: dict[str, torch.Tensor | None], name: str = names.WEIGHTS) -> None:
    """Overwrites tensors of a file; None removes one."""
    found = load_file(folder / name) | changed
    save_file({name: t for name, t in found.items() if t is not None}, folder / name, metadata={"format": "pt"})


def in_shards(folder: Path) -> Path:
    """Divides the weights in two files, which an index lists."""
    found = load_file(folder / names.WEIGHTS)
    (folder / names.WEIGHTS).unlink()
    listed = {name: (FIRST, SECOND)[number % 2] for number, name in enumerate(found)}
    for file in (FIRST, SECOND):
        part = {name: tensor for name, tensor in found.items() if listed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": listed})
    return folder


def list_in(folder: Path, name: str) -> Path:
    """Puts the weights into the file `name`, which an index lists, and a pickle there for any other."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    found = load_file(folder / names.WEIGHTS)
    (folder / names.WEIGHTS).rename(target)
    if not name.endswith(".safetensors"):
        torch.save({"mark": Runs(Path.touch, folder / "was-run")}, target)
    write(folder / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(found, name)})
    return target


def name_in_configuration(folder: Path, name: object) -> Path:
    torch.save({"mark": Runs(Path.touch, folder / "was-run")}, folder / "adapter_model.bin")
    change(folder / names.CONFIG, transformers_weights=name)
    return folder / "adapter_model.bin"


def link_to_nothing(folder: Path) -> None:
    (folder / names.TOKENIZER).unlink()
    (folder / names.TOKENIZER).symlink_to(folder.parent / "nowhere")


def name_another_type(folder: Path) -> None:
    weights = folder / names.WEIGHTS
    write(weights, weights.read_bytes().replace(b'"F32"', b'"X32"', 1))


SHAPE = "has another shape" if TRANSFORMERS_4 else r"has shape \("  # transformers 4 does not tell the shape
LINKED = (names.CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)
REFUSED: dict[str, Refused] = {
    # the configuration
    "no JSON": (lambda f: write(f / names.CONFIG, "{"), IntegrityError, names.CONFIG),
    "a list": (lambda f: write(f / names.CONFIG, "[1]"), IntegrityError, names.CONFIG),
    "quantized": (config(quantization_config={"quant_method": "hqq"}), InputError, "quantized already.*'hqq'"),
    "an unknown type": (config(model_type="nonesuch"), InputError, "transformers .* cannot load .*nonesuch"),
    "an encoder-decoder": (config(model_type="t5"), InputError, r"holds an encoder-decoder \(t5\)"),
    **{
        f"larger than the files: {entries}": (config(**entries), InputError, "asks for more than the")
        for entries in (
            {"num_hidden_layers": 65}, {"vocab_size": 2**40}, {"max_position_embeddings": MOST_POSITIONS + 1},
            {"text_config": {"num_hidden_layers": 10**9}},
        )
    },
    # weights that do not fit it
    "no head": (lambda f: tensors(f, {"lm_head.weight": None}), InputError, "has no weight 'lm_head.weight', which Ll"),
    "another width": (config(hidden_size=32, head_dim=8), InputError, rf"{SHAPE}.*its config.json asks for \("),
    "fewer layers": (config(num_hidden_layers=1), InputError, r"the weight 'model.layers.1.* has no layer"),
    "more layers": (config(num_hidden_layers=3), InputError, r"no weight 'model.layers.2.* and 8 more"),
    "an empty tensor": (
        lambda f: tensors(f, dict.fromkeys(("model.norm.weight", "unused"), torch.zeros(0))),
        InputError, rf"the weight model.norm.weight of .*{SHAPE}.*asks for \(64,\)",
    ),
    # files
    "no weights": (lambda f: (f / names.WEIGHTS).unlink(), MissingFileError, "no weights: expected model.safetensors"),
    "cut in its header": (lambda f: os.truncate(f / names.WEIGHTS, 10), IntegrityError, "cannot be read as safetensor"),
    "cut": (lambda f: os.truncate(f / names.WEIGHTS, 100_000), IntegrityError, "cannot be read .*copy it again"),
    "an unknown number": (name_another_type, IntegrityError, "cannot be read .*X32"),
    "a missing shard": (lambda f: (in_shards(f) / SECOND).unlink(), MissingFileError, f"lacks {SECOND}, which {INDEX}"),
    "a shard of another model": (
        lambda f: shutil.copy(in_shards(f) / FIRST, f / SECOND),
        InputError, "has no weight '.*' and 9 more, which Llama.* needs: the files are incomplete",
    ),
    "no index": (lambda f: (in_shards(f) / INDEX).unlink(), MissingFileError, f"the shard {FIRST} and no {INDEX}"),
    "an index without its map": (lambda f: write(f / INDEX, {"weight_map": 3}), InputError, "has no weight_map"),
    # files elsewhere, and pickles
    **{f"listed in {name}": (partial(list_in, name=name), InputError, f"{INDEX} names the weights '{re.escape(name)}'")
       for name in ("evil.bin", "../evil.bin", "../outside.safetensors", "sub/model.safetensors")},
    **{f"named {name}": (partial(name_in_configuration, name=name), InputError, f"names the weights {name!r}")
       for name in ("adapter_model.bin", "sub/x.safetensors.index.json", "../outside.safetensors", 3)},
    **{f"a link of {name}": (partial(link_out, name=name), InputError, f"{name} leads out of .*: copy the file itself")
       for name in (*LINKED, "additional_chat_templates/tool_use.jinja")},
    "a link to nothing": (link_to_nothing, MissingFileError, "tokenizer.json is a link to a file that is not there"),
}  # fmt: skip
if not TRANSFORMERS_4:  # which guesses by the folder's name, and uses the embedding
    REFUSED["no type"] = (config(model_type=None, architectures=None), InputError, "cannot load .*model_type")


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


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_folder_is_refused_and_no_code_of_it_runs(spoilt, llama_folder, opened):
    spoil, error, word = REFUSED[spoilt]
    forbidden = spoil(llama_folder)
    opened.clear()
    with pytest.raises(error, match=word) as caught:
        open_source(llama_folder)
    assert str(llama_folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    if spoilt.startswith(("listed in", "named", "a link of")):
        assert forbidden.resolve() not in opened
    assert not (llama_folder / "was-run").exists()


def test_weights_that_are_only_pickled_come_with_a_command_that_converts_them(saved_llama, llama_folder, tmp_path):
    folder = llama_folder.rename(tmp_path / 'it\'s $(touch here) "mine"')
    head = load_file(folder / names.WEIGHTS)["lm_head.weight"]
    torch.save(load_file(folder / names.WEIGHTS), folder / "pytorch_model.bin")
    (folder / names.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has its weights only as pytorch_model\.bin, a pickle") as caught:
        open_source(folder)
    command = str(caught.value).split("convert it with ")[1].split(" and export that folder")[0]
    echoed = subprocess.run(["sh", "-c", command.replace("python", "printf %s", 1)], capture_output=True, text=True)
    program = echoed.stdout.removeprefix("-c")
    assert shlex.split(command) == ["python", "-c", program]  # a shell reads it so, and runs nothing of the name
    exec(program)
    converted = open_source(f"{folder}-safetensors")
    assert torch.equal(converted.module.model.lm_head.weight, head)  # type: ignore[arg-type]
    assert converted.tokenizer == open_source(saved_llama).tokenizer


# --- what is accepted ---------------------------------------------------------------------------------------------
def test_the_weights_are_those_of_the_files_that_transformers_reads(llama_folder):
    told: list[int] = []
    shutil.copy(llama_folder / names.WEIGHTS, llama_folder / "consolidated.safetensors")
    change(llama_folder / names.CONFIG, dtype="bfloat16")
    heads = []
    for _ in range(2):
        model: Any = open_source(llama_folder, Opening(before_loading=lambda weights, *_: told.append(weights))).module
        assert told.pop() == sum(parameter.numel() for parameter in model.parameters())
        heads.append(model.model.lm_head.weight)
        if (llama_folder / names.WEIGHTS).is_file():
            in_shards(llama_folder)
    assert torch.equal(*heads)


def test_a_snapshot_of_the_hub_cache_is_a_source(llama_folder, tmp_path):
    """Each file a link to a blob next to the snapshots, as a download makes it; one is a regular file."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    (llama_folder / "additional_chat_templates").mkdir()
    write(llama_folder / "additional_chat_templates" / "tool_use.jinja", "{{ tools }}")
    for number, file in enumerate(sorted(path for path in llama_folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(llama_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file.name == names.TOKENIZER:
            file.rename(link)
            continue
        link.symlink_to(os.path.relpath(file.rename(blobs / f"{number:040x}"), link.parent))
    (tmp_path / "named").symlink_to(snapshot)
    source = open_source(tmp_path / "named")  # which may itself be a link
    assert (source.name, source.tokenizer is None) == ("0123abc", False)
    assert {"default", "tool_use"} <= {entry["name"] for entry in source.tokenizer_config["chat_template"]}


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_what_the_machine_has_not_is_said_before_loading(saved_llama, tmp_path, monkeypatch, short):
    def loads(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
    if short == "memory":
        monkeypatch.setattr(resources, "available_memory", lambda: 1 << 20)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 10))
    with pytest.raises(ResourceError, match=f"of {short} and"):
        export(saved_llama, tmp_path / "bundle", "fp32")
    assert list(tmp_path.iterdir()) == []


# --- a folder with its own code -----------------------------------------------------------------------------------
CODE = {
    "configuration_tiny.py": "from transformers import LlamaConfig\n\n"
    "class TinyConfig(LlamaConfig):\n    model_type = 'tiny'\n",
    "modeling_tiny.py": "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n\n"
    "class TinyModel(LlamaForCausalLM):\n    config_class = TinyConfig\n",
}


@pytest.fixture
def custom(llama_folder, tmp_path, monkeypatch):
    """A folder whose model is Python code in it."""
    # transformers copies such code into its cache before it imports it.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, content in CODE.items():
        write(llama_folder / name, content)
    auto = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    change(llama_folder / names.CONFIG, model_type="tiny", architectures=["TinyModel"], auto_map=auto)
    return llama_folder


def test_code_of_a_folder_runs_only_where_it_is_trusted(custom):
    told: list[str] = []
    source = open_source(custom, Opening(trust_remote_code=True, say=told.append))
    assert (type(source.module.model).__name__, "auto_map" in source.config) == ("TinyModel", False)
    assert f"run the Python code of {custom}: configuration_tiny.py, modeling_tiny.py" in told
    write(custom / "modeling_tiny.py", "raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"\(configuration_tiny.py, modeling_tiny.py\).* add --trust-remote-code"):
        open_source(custom)


@pytest.mark.slow
def test_code_that_is_trusted_is_exported_and_verified(custom, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert main(["export", str(custom), "--out", str(out), "--precision", "fp32", "--trust-remote-code"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), str(custom), "--trust-remote-code"]) == 0
    assert "modeling_tiny.py" in capsys.readouterr().err
