"""A model that exists is trained further, whole or by LoRA, and saved as what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.train import checkpoint as module
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from pastkey.train.loop import Run, resume, train
from pastkey.train.model import positions_like
from pastkey.train.pretrained import open_start, reopen
from pastkey.train.report import read_metrics
from pastkey.train.settings import TrainConfig

from .helpers import tiny, write_corpus

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from ..export.tiny_llama import bpe, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and peft's own
IDS = torch.tensor([[5, 17, 256, 80, 3, 41]])
KINDS = ["llama", "gpt2", "checkpoint"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One folder of each of KINDS, and a text."""
    folder = tmp_path_factory.mktemp("models")
    llama(eos_token_id=1, bos_token_id=0).save_pretrained(folder / "llama")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=300, **sizes)
    assert config.attn_pdrop > 0  # its dropout must be the same in a resumed run
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    for kind in ("llama", "gpt2"):
        bpe(bos=True).save_pretrained(folder / kind)
    text = write_corpus(folder / "text.txt")
    train(tiny(steps=1, save_every=1), folder / "checkpoint", data=[text])
    return folder


def settings(base: Path, **others: Any) -> TrainConfig:
    given = {"init": str(base), "steps": 4, "save_every": 2, "batch_size": 2, "context": 16, "threads": 1}
    return TrainConfig.from_given(given | {"learning_rate": 1e-3} | others)


def logits(model: Any) -> torch.Tensor:
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids, positions_like(ids))


def opened(folder: Path) -> Any:
    return (
        load_checkpoint(folder)
        if (folder / names.CONFIG).exists() and module.layout_of(folder) is None
        else reopen(folder)
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stops_goes_on_as_if_it_had_not(kind, lora, models, tmp_path, monkeypatch):
    config = settings(models / kind, lora=lora, learning_rate=1e-2)
    train(config, tmp_path / "whole", data=[models / "text.txt"])
    step = Run._one_step

    def stopped(run: Run) -> Any:
        if run.step == 3:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "_one_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", data=[models / "text.txt"])
    monkeypatch.undo()
    resume(tmp_path / "cut", {})
    whole, cut = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    assert whole[-1]["val_loss"] < whole[2]["val_loss"]
    one, two = opened(tmp_path / "whole"), opened(tmp_path / "cut")
    assert torch.equal(logits(one.model), logits(two.model))
    moments = load_optimizer(tmp_path / "whole", one.training)
    assert all(".lora_" in name for name in moments) == lora


def test_a_fine_tuned_folder_is_one_of_transformers(models, tmp_path):
    train(settings(models / "llama"), tmp_path / "out", data=[models / "text.txt"])
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, logits(reopen(tmp_path / "out").model))
    assert not torch.equal(loaded(IDS).logits, llama(eos_token_id=1, bos_token_id=0)(IDS).logits)
    assert loaded.config.max_position_embeddings == llama().config.max_position_embeddings  # not the run's context
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Once upon").input_ids == bpe(bos=True)("Once upon").input_ids
    assert tokenizer.eos_token_id == 1
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".new"] == []


def test_an_adapter_is_one_of_peft(models, tmp_path):
    import peft

    train(settings(models / "llama", lora=True, lora_rank=2), tmp_path / "out", data=[models / "text.txt"])
    content = json.loads((tmp_path / "out" / names.ADAPTER_CONFIG).read_text())
    assert (content["r"], content["lora_alpha"]) == (2, 4)
    assert content["base_model_name_or_path"] == str(models / "llama")
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(content["target_modules"]) == projections
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, logits(reopen(tmp_path / "out").model))
    assert not (tmp_path / "out" / names.WEIGHTS).exists()


def test_a_new_adapter_changes_nothing(models):
    full, lora = (open_start(settings(models / "llama", lora=lora), Path("out")).model for lora in (False, True))
    assert torch.equal(logits(full), logits(lora))


def test_samples_are_those_of_the_model(models):
    model: Any = open_start(settings(models / "llama"), Path("out")).model
    (greedy,) = model.generate(IDS, 5, temperature=0.0, seed=0)
    ids = torch.cat((IDS, torch.tensor([greedy])), dim=1)
    assert model(ids, positions_like(ids))[0, IDS.shape[1] - 1 : -1].argmax(-1).tolist() == greedy
    one, again, other = (model.generate(IDS, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(model.generate(IDS, 200, temperature=1.0, seed=1)[0]) <= 80 - IDS.shape[1]  # the context


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "checkpoint"])
def test_gradient_checkpointing_gives_the_same_run(kind, lora, models, tmp_path):
    for name, option in (("plain", False), ("less", True)):
        config = settings(models / kind, gradient_checkpointing=option, lora=lora)
        train(config, tmp_path / name, data=[models / "text.txt"])
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "less")


def test_an_interrupted_save_keeps_the_one_before(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(settings(models / "llama", steps=2), out, data=[models / "text.txt"])
    before = logits(reopen(out).model)

    def interrupted(path: Path, content: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resume(out, {"steps": 4})
    monkeypatch.undo()
    assert torch.equal(logits(reopen(out).model), before)
    assert not list(out.rglob("*.new"))


def test_a_model_is_fine_tuned_once_more(models, tmp_path):
    train(settings(models / "llama", steps=2), tmp_path / "one", data=[models / "text.txt"])
    first = open_start(settings(tmp_path / "one"), Path("out")).model
    assert torch.equal(logits(first), logits(reopen(tmp_path / "one").model))
    adapter = settings(models / "llama", steps=2, lora=True)
    train(adapter, tmp_path / "adapter", data=[models / "text.txt"])
    with pytest.raises(InputError, match="is an adapter and no model"):
        open_start(settings(tmp_path / "adapter"), Path("out"))


def test_the_context_is_the_models_or_512(models):
    assert open_start(settings(models / "llama", context=None), Path("out")).config.context == 80
    with pytest.raises(InputError, match="--context 81 is more than the 80 tokens"):
        open_start(settings(models / "llama", context=81), Path("out"))


def test_the_base_of_an_adapter_must_be_there(models, tmp_path):
    shutil.copytree(models / "llama", tmp_path / "base")
    train(settings(tmp_path / "base", lora=True, steps=2), tmp_path / "out", data=[models / "text.txt"])
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match="put it there, or a link to it"):
        resume(tmp_path / "out", {"steps": 4})
    (tmp_path / "base").symlink_to("elsewhere")
    assert resume(tmp_path / "out", {"steps": 4})["step"] == 4


def test_what_cannot_be_opened_is_named(models, tmp_path):
    def refused(base: Path, words: str, kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=words):
            open_start(settings(base), Path("out"))

    refused(tmp_path / "none", "--init takes a checkpoint, a Hugging Face folder or a GGUF file", MissingFileError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    folder = shutil.copytree(models / "llama", tmp_path / "changed")
    weights = (folder / names.WEIGHTS).read_bytes()
    (folder / names.WEIGHTS).write_bytes(weights[:1000])
    refused(folder, "cannot load")
    (folder / names.WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "cannot load")
    config = json.loads((folder / names.CONFIG).read_text())
    (folder / names.WEIGHTS).write_bytes(weights)
    (folder / names.CONFIG).write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, "has no weight 'model.layers.2")
    (folder / names.CONFIG).write_text(json.dumps(config))
    content = json.loads((folder / names.TOKENIZER).read_text())
    content["model"]["vocab"]["too many"] = 300
    (folder / names.TOKENIZER).write_text(json.dumps(content))
    refused(folder, "has 301 tokens and the model 300 embeddings")


def test_added_tokens_need_embeddings(models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "grown")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<1>", "<2>", "<3>", "<4>", "<tool>", "</tool>"])  # of ids 296 to 301
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="has 302 tokens and the model 300 embeddings"):
        open_start(settings(folder), Path("out"))


def test_what_does_not_go_with_init_is_named(models, tmp_path):
    with pytest.raises(InputError, match="--layers is for a new model"):
        settings(models / "llama", layers=3)
    with pytest.raises(InputError, match="--lora is for a model that exists"):
        TrainConfig(lora=True)
    with pytest.raises(InputError, match="needs --data"):
        train(settings(models / "llama"), tmp_path / "out")
    folder = shutil.copytree(models / "checkpoint", tmp_path / "own")
    with pytest.raises(InputError, match="is the model of --init"):
        train(settings(folder), folder, data=[models / "text.txt"], force=True)


def test_a_changed_file_of_a_fine_tuned_folder_is_named(models, tmp_path):
    train(settings(models / "llama", steps=2), tmp_path / "out", data=[models / "text.txt"])
    with (tmp_path / "out" / names.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(IntegrityError, match=r"model\.safetensors was altered"):
        resume(tmp_path / "out", {"steps": 4})


@pytest.mark.parametrize("lora", [False, True])
def test_a_gguf_file_is_fine_tuned_and_goes_on(lora, models, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from ..export.source.test_gguf import write_gguf

    file = write_gguf(tmp_path / "model.gguf", quantized=True)
    train(settings(file, lora=lora, steps=2), tmp_path / "out", data=[models / "text.txt"])
    if lora:
        assert json.loads((tmp_path / "out" / names.ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(file)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(IDS).logits, logits(reopen(tmp_path / "out").model))
    assert resume(tmp_path / "out", {"steps": 4})["step"] == 4
