"""A model that exists, opened to be trained further: pastkey's own, or transformers' from a folder or a GGUF file.

A model of transformers is saved as an ordinary Hugging Face folder. With LoRA it is an adapter folder of peft,
which names its base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pastkey.contract import names
from pastkey.contract.source_files import adapter_base
from pastkey.errors import InputError, MissingFileError, PastkeyError, first_line, missing_extra
from pastkey.files.durable import write_json
from pastkey.files.folder import hub_id, read_json
from pastkey.files.reading import is_panic
from pastkey.quiet import quiet

from .checkpoint import PEFT, TRANSFORMERS, check_files, check_settled, layout_of, load_checkpoint
from .model import Decoder, generate
from .settings import FINE_TUNING_CONTEXT, TrainConfig
from .tokenizer import TextTokenizer, read_tokenizer


@dataclass(frozen=True)
class Sizes:
    """The facts that training needs of a model's configuration."""

    vocab_size: int  # V, the rows of its embedding
    max_position_embeddings: int  # the context length, in tokens


class Pretrained(nn.Module):
    """A decoder of transformers, or any decoder with LoRA: `forward(input_ids, position_ids) -> logits`."""

    def __init__(self, model: Any, config: Sizes, layout: str) -> None:
        """`layout`, TRANSFORMERS or PEFT, is the kind of folder that `save` writes."""
        super().__init__()
        self.model, self.config, self.layout = model, config, layout
        self._arguments = {} if isinstance(self.inner, Decoder) else {"use_cache": False}
        # Families without positions, such as those of ALiBi, have no such argument.
        self._has_positions = "position_ids" in inspect.signature(self.inner.forward).parameters

    @property
    def inner(self) -> Any:
        """The model without peft's wrapper."""
        return self.model.get_base_model() if self.layout == PEFT else self.model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Returns the logits of the next token at every position: (B, T, V) of (B, T) int64."""
        positions = {"position_ids": position_ids} if self._has_positions else {}
        output = self.model(input_ids=input_ids, **positions, **self._arguments)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def generate(self, prompt: Tensor, max_new_tokens: int, *, temperature: float, seed: int) -> list[list[int]]:
        """Returns the new ids of each row of `prompt` (B, P), drawn at this temperature, or with 0 the most likely."""
        if isinstance(self.inner, Decoder):
            return generate(self.inner, prompt, max_new_tokens, temperature=temperature, seed=seed)
        max_new_tokens = min(max_new_tokens, self.config.max_position_embeddings - prompt.shape[1])
        if max_new_tokens < 1:
            return [[] for _ in prompt]
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        chosen = drawn if temperature > 0 else {"do_sample": False}
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            ids = self.inner.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, use_cache=True, **chosen
            )
        rows: list[list[int]] = ids[:, prompt.shape[1] :].tolist()
        return rows

    def end_at(self, token: int) -> None:
        """Makes this token the first of those that end a generation, for all programs that read the folder."""
        generation = getattr(self.inner, "generation_config", None)
        if generation is not None:
            before = generation.eos_token_id
            ends = before if isinstance(before, list) else [before]
            others = [end for end in ends if end not in (None, token)]
            generation.eos_token_id = [token, *others] if others else token

    def save(self, folder: Path) -> None:
        """Writes the configuration and the weights, or the adapter, into an empty folder."""
        # peft would otherwise ask the Hub whether the base's vocabulary has grown.
        options = {"save_embedding_layers": False} if self.layout == PEFT else {"max_shard_size": "10000GB"}
        with quiet():
            self.model.save_pretrained(folder, **options)
        (folder / "README.md").unlink(missing_ok=True)  # peft's, a form to fill in


def checkpoint_activations(model: Decoder | Pretrained) -> None:
    """Keeps one activation per layer, and computes the others again in the backward pass."""
    inner: Any = model if isinstance(model, Decoder) else model.inner
    if isinstance(inner, Decoder):
        inner.model.checkpointing = True
        return
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise InputError(f"{type(inner).__name__} has no gradient checkpointing: leave out --gradient-checkpointing")
    with quiet():  # transformers 5 warns of a change in its next version
        inner.gradient_checkpointing_enable({"use_reentrant": False})


# --- opening ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Start:
    """The beginning of a run with `--init`."""

    config: TrainConfig  # with the context length
    model: Decoder | Pretrained
    tokenizer: TextTokenizer


def open_start(config: TrainConfig, out: Path) -> Start:
    """Opens the model that `config.init` names, in float32, for a run that writes `out`.

    Raises MissingFileError, InputError or IntegrityError, and MissingExtraError without transformers or peft.
    """
    path = Path(str(config.init))
    if not path.exists():
        fetch = f"; fetch it first:  hf download {path} --local-dir {path.name}" if hub_id(str(path)) else ""
        raise MissingFileError(
            f"no model {str(path)!r}: --init accepts a checkpoint, a Hugging Face folder or a GGUF file{fetch}"
        )
    if out.resolve() == path.resolve():
        raise InputError(f"--out {out} is the model of --init, which training would replace: choose another --out")
    model, tokenizer = _open(path)
    longest, rows = model.config.max_position_embeddings, model.config.vocab_size
    context = config.context or min(longest, FINE_TUNING_CONTEXT)
    if context > longest:
        raise InputError(f"--context {context} is more than the {longest} tokens that {path} was made for")
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens and the model {rows} embeddings: put the "
            "tokenizer.json that the model was trained with there"
        )
    if config.lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _with_lora(model, path, config.lora_rank)
    return Start(dataclasses.replace(config, context=context), model, tokenizer)


def _open(path: Path) -> tuple[Decoder | Pretrained, TextTokenizer]:
    """Returns a model and its tokenizer."""
    layout = layout_of(path)
    if layout == PEFT or (path / names.ADAPTER_CONFIG).is_file():
        raise InputError(f"{path} is an adapter and no model: continue it with --resume, or merge it by pastkey export")
    if layout is None and (path / names.MANIFEST).is_file():
        checkpoint = load_checkpoint(path)
        tokenizer = read_tokenizer(checkpoint.tokenizer_path)
        begin, end = checkpoint.config.bos_token_id, checkpoint.config.eos_token_id
        return checkpoint.model, dataclasses.replace(tokenizer, begin=begin, end=tokenizer.end if end is None else end)
    if layout is not None:
        check_settled(path)
    if path.is_dir() and not (path / names.CONFIG).is_file():
        raise InputError(
            f"{path} has no {names.CONFIG}: --init accepts a checkpoint, a Hugging Face folder or a GGUF file"
        )
    with transformers_opening(path, "train") as library, TemporaryDirectory() as folder:
        model = _load(library, path)
        _write_tokenizer(library, path, Path(folder), model.config.vocab_size)
        return model, read_tokenizer(Path(folder) / names.TOKENIZER)


def _load(library: Any, path: Path) -> Pretrained:
    """Loads a model of transformers from a folder or a GGUF file. All of its weights must come from there."""
    # Only safetensors: a pickle can run any code when it is read, and so can the code of a folder.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    folder, kind = (path, {"use_safetensors": True}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model, info = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **kind)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path} has no weight {missing[0]!r}, which its {type(model).__name__} needs: copy it again")
    if not path.is_dir():  # transformers does not save a model that it considers quantized
        model.hf_quantizer = None
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
    config = model.config.get_text_config()
    named = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")]
    longest = next((n for n in named if isinstance(n, int)), FINE_TUNING_CONTEXT)
    rows = model.get_input_embeddings().weight.shape[0]
    return Pretrained(torch.nn.Module.float(model), Sizes(rows, longest), TRANSFORMERS)


def _write_tokenizer(library: Any, path: Path, out: Path, vocab_size: int) -> None:
    """Writes the tokenizer of a folder or a GGUF file as tokenizer.json and its configuration, in any form it has."""
    folder, kind = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kind)
    tokenizer.save_pretrained(out)
    if not (out / names.TOKENIZER).is_file():
        raise InputError(
            f"the tokenizer of {path} is a {type(tokenizer).__name__}, which is not of the tokenizers library: put its "
            f"{names.TOKENIZER} into the folder"
        )
    content = read_json(out / names.TOKENIZER)
    # transformers adds tokens that it expects of every tokenizer of a kind, even if the source has none.
    own = read_json(path / names.TOKENIZER) if (path / names.TOKENIZER).is_file() else {}
    given = {token["content"] for token in own.get("added_tokens", [])}
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < vocab_size or token["content"] in given
    ]
    write_json(out / names.TOKENIZER, content)


@contextlib.contextmanager
def transformers_opening(source: object, *needed_by: str) -> Iterator[Any]:
    """Yields the library, silenced; its exceptions about the source become InputErrors.

    Raises MissingExtraError without it; `needed_by` as of `missing_extra`.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing_extra(error, *needed_by) from None
    try:
        with quiet():
            yield transformers
    except (PastkeyError, MemoryError):
        raise
    except BaseException as error:  # each format's reader has its own kinds
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = first_line(error).rstrip(".")
        raise InputError(f"transformers {transformers.__version__} cannot load {source}: {reason}") from error


# --- LoRA ---------------------------------------------------------------------------------------------------------
def _with_lora(model: Decoder | Pretrained, base: Path, rank: int) -> Pretrained:
    """Freezes the model, and gives every projection but the output head a trained update of this rank, zero at first.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    peft = _peft()
    inner = model if isinstance(model, Decoder) else model.model
    config = peft.LoraConfig(
        task_type=None if isinstance(model, Decoder) else "CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_projections(inner),
    )
    with quiet():
        adapted = peft.get_peft_model(inner, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base.resolve())
    return Pretrained(adapted, Sizes(model.config.vocab_size, model.config.max_position_embeddings), PEFT)


def _projections(model: nn.Module) -> list[str]:
    """Returns the last names of all linear layers but the output head."""
    head = model.lm_head if isinstance(model, Decoder) else model.get_output_embeddings()  # type: ignore[operator]
    linear = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")  # GPT-2's
    )
    return sorted(set(linear))


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from None
    return peft


# --- resuming -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FineTuned:
    """The save of a run with `--init`, opened to continue."""

    path: Path
    config: Sizes
    model: Pretrained
    training: Mapping[str, Any]


def reopen(folder: Path) -> FineTuned:
    """Opens a fine-tuned model or an adapter whose files are as the manifest says. Raises as `open_start`."""
    training = check_files(folder)
    if layout_of(folder) == TRANSFORMERS:
        with transformers_opening(folder, "train") as library:
            model = _load(library, folder)
        return FineTuned(folder, model.config, model, training)
    base = base_of(folder)
    found, _ = _open(base)
    inner = found if isinstance(found, Decoder) else found.model
    with transformers_opening(folder, "train"):
        adapted = _peft().PeftModel.from_pretrained(inner, folder, is_trainable=True)
    sizes = Sizes(found.config.vocab_size, found.config.max_position_embeddings)
    return FineTuned(folder, sizes, Pretrained(adapted, sizes, PEFT), training)


def base_of(folder: Path) -> Path:
    """Returns the path of an adapter's base. Raises MissingFileError if it is not there."""
    base = Path(str(adapter_base(folder)))
    if not base.exists():
        raise MissingFileError(f"the base of the adapter {folder} is not at {base}: put it there, or a link to it")
    return base
