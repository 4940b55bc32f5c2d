"""A model that exists is trained further, whole or by LoRA, and saved as what it was."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.train import checkpoint as module
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from pastkey.train.loop import resume, train
from pastkey.train.model import positions_like
from pastkey.train.pretrained import open_start, reopen
from pastkey.train.report import read_metrics
from pastkey.train.settings import TrainConfig

from ..shared import divided
from .helpers import Stop, before_step, stop, tiny, write_corpus

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
    return TrainConfig.from_given(given | {"lora_rank": 2, "learning_rate": 1e-2} | others)


def started(base: Path, **others: Any) -> Any:
    return open_start(settings(base, **others), Path("out"))


def logits(model: Any) -> torch.Tensor:
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids, positions_like(ids))


def opened(folder: Path) -> Any:
    return load_checkpoint(folder) if module.layout_of(folder) is None else reopen(folder)


@pytest.fixture(scope="module")
def whole(models):
    """whole(KIND, LORA): the run of four steps of that model, which is made once."""

    def made(kind: str, lora: bool) -> Path:
        out = models / f"{kind}-{lora}"
        if not out.exists():
            train(settings(models / kind, lora=lora), out, data=[models / "text.txt"])
        return out

    return made


RUNS = [*itertools.product(KINDS, [False, True])]
QUICK, CI = [("gpt2", False), ("checkpoint", False)], [("llama", True), ("checkpoint", True)]


@pytest.mark.parametrize(("kind", "lora"), divided(RUNS, quick=QUICK, ci=CI))
def test_a_run_that_stops_goes_on_as_if_it_had_not(kind, lora, whole, models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 3, stop)
        config = settings(models / kind, lora=lora, gradient_checkpointing=kind != "gpt2")  # which changes nothing
        with pytest.raises(Stop):
            train(config, tmp_path / "cut", data=[models / "text.txt"])
    resume(tmp_path / "cut", {})
    cut = read_metrics(tmp_path / "cut")
    assert read_metrics(whole(kind, lora)) == cut
    assert cut[-1]["val_loss"] < cut[2]["val_loss"]
    one, two = opened(whole(kind, lora)), opened(tmp_path / "cut")
    assert torch.equal(logits(one.model), logits(two.model))
    moments = load_optimizer(tmp_path / "cut", two.training)
    assert all(".lora_" in name for name in moments) == lora


@pytest.mark.oldest
def test_a_fine_tuned_folder_is_one_of_transformers(whole):
    out = whole("llama", False)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, logits(reopen(out).model))
    assert not torch.equal(loaded(IDS).logits, llama(eos_token_id=1, bos_token_id=0)(IDS).logits)
    assert loaded.config.max_position_embeddings == llama().config.max_position_embeddings  # not the run's context
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Once upon").input_ids == bpe(bos=True)("Once upon").input_ids
    assert tokenizer.eos_token_id == 1


@pytest.mark.oldest
def test_an_adapter_is_one_of_peft(whole, models):
    import peft

    out = whole("llama", True)
    content = json.loads((out / names.ADAPTER_CONFIG).read_text())
    assert (content["r"], content["lora_alpha"]) == (2, 4)
    assert content["base_model_name_or_path"] == str(models / "llama")
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(content["target_modules"]) == projections
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(IDS).logits, logits(reopen(out).model))
    assert not (out / names.WEIGHTS).exists()


def test_samples_are_those_of_the_model_which_a_new_adapter_leaves_as_it_is(models):
    model: Any = started(models / "llama").model
    assert torch.equal(logits(model), logits(started(models / "llama", lora=True).model))
    (greedy,) = model.generate(IDS, 5, temperature=0.0, seed=0)
    ids = torch.cat((IDS, torch.tensor([greedy])), dim=1)
    assert model(ids, positions_like(ids))[0, IDS.shape[1] - 1 : -1].argmax(-1).tolist() == greedy
    one, again, other = (model.generate(IDS, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(model.generate(IDS, 200, temperature=1.0, seed=1)[0]) <= 80 - IDS.shape[1]  # the context


def test_a_model_is_fine_tuned_once_more_and_an_adapter_is_not(whole):
    first = started(whole("llama", False)).model
    assert torch.equal(logits(first), logits(reopen(whole("llama", False)).model))
    with pytest.raises(InputError, match="is an adapter and no model"):
        started(whole("llama", True))


def test_the_context_is_the_models_or_512(models):
    assert started(models / "llama", context=None).config.context == 80
    with pytest.raises(InputError, match="--context 81 is more than the 80 tokens"):
        started(models / "llama", context=81)


def test_an_adapter_goes_on_where_its_files_are_unchanged_and_its_base_is_there(models, tmp_path):
    shutil.copytree(models / "llama", tmp_path / "base")
    train(settings(tmp_path / "base", lora=True, steps=2), tmp_path / "out", data=[models / "text.txt"])
    size = (tmp_path / "out" / names.ADAPTER_WEIGHTS).stat().st_size
    with (tmp_path / "out" / names.ADAPTER_WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match=rf"{names.ADAPTER_WEIGHTS} has "):
        resume(tmp_path / "out", {"steps": 4})
    os.truncate(tmp_path / "out" / names.ADAPTER_WEIGHTS, size)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match="put it there, or a link to it"):
        resume(tmp_path / "out", {"steps": 4})
    (tmp_path / "base").symlink_to("elsewhere")
    assert resume(tmp_path / "out", {"steps": 4})["step"] == 4


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / names.CONFIG).read_text())
    (folder / names.CONFIG).write_text(json.dumps(config | changes))


def added_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<1>", "<2>", "<3>", "<4>", "<tool>", "</tool>"])  # of ids 296 to 301
    tokenizer.save_pretrained(folder)


REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, MissingFileError, "--init accepts a checkpoint, a Hugging Face folder or a GGUF file"),
    "no configuration": (lambda folder: (folder / names.CONFIG).unlink(), InputError, "has no config.json"),
    "cut weights": (lambda folder: os.truncate(folder / names.WEIGHTS, 1000), InputError, "cannot load"),
    "more layers": (lambda f: configured(f, num_hidden_layers=3), InputError, "has no weight 'model.layers.2"),
    "added tokens": (added_tokens, InputError, "has 302 tokens and the model 300 embeddings"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_start_that_cannot_be_opened_is_refused(spoilt, models, tmp_path):
    spoil, error, word = REFUSED[spoilt]
    folder = shutil.copytree(models / "llama", tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(error, match=word):
        started(folder)


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


@pytest.mark.slow
def test_a_gguf_file_is_fine_tuned_and_goes_on(models, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from ..export.source.test_gguf import write_gguf

    file = write_gguf(tmp_path / "model.gguf", quantized=True)
    train(settings(file, lora=True, steps=2), tmp_path / "out", data=[models / "text.txt"])
    assert json.loads((tmp_path / "out" / names.ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(file)
    assert resume(tmp_path / "out", {"steps": 3})["step"] == 3
