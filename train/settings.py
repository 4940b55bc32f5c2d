"""Every setting of training, defined once: defaults, presets, and the model's configuration derived from them.

Does not import torch, so that the command line can show all settings at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pastkey.contract.config import ROPE_TYPES, ModelConfig, RopeScaling
from pastkey.errors import InputError
from pastkey.typed import parse
from pastkey.values import is_int, is_number, require, shown

OPTIMIZERS: Final = ("muon", "adamw")
DEVICES: Final = ("auto", "cpu", "cuda", "mps")
PRECISIONS: Final = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of training. Sizes that are None are the preset's."""

    preset: str = "llama"
    steps: int = 1450  # optimizer steps
    minutes: float | None = None  # plan as many steps as this time allows, in the place of `steps`
    batch_size: int = 24  # rows of a batch
    accumulate: int = 1  # batches per optimizer step
    optimizer: str = "muon"  # muon for the matrices of projections and adamw for all else, or adamw for all
    learning_rate: float = 3.5e-3  # of AdamW, at the peak, after the warm-up; Muon takes steps in proportion
    warmup_steps: int = 40
    weight_decay: float = 0.1  # on weight matrices only
    gradient_clip: float = 1.0  # maximum norm of all gradients together
    save_every: int = 145  # steps between checkpoints, each with validation, sample and curve
    seed: int = 0
    threads: int | None = None  # None: as many as torch chooses
    device: str = "auto"  # of DEVICES; auto: CUDA if there is a card, or else the CPU
    precision: str = "auto"  # of PRECISIONS; auto: bfloat16 where CUDA has it, or else float32
    compile: bool | None = None  # None: on CUDA
    shard: bool = False  # divide weights, gradients and moments among the processes, by FSDP2
    peak_tflops: float | None = None  # of one device, for its utilisation; None: from a table of cards
    tokenizer: str = "bpe"  # bpe, char, word, or the path of a tokenizer.json
    vocab_size: int = 1024  # maximum, for a trained tokenizer
    context: int | None = None  # tokens
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_scaling: str | None = None  # linear, dynamic, yarn or llama3
    rope_factor: float | None = None  # with rope_scaling
    original_context: int | None = None  # tokens, for yarn and llama3; None: the context / rope_factor
    init: str | None = None  # a model to go on with: a checkpoint, a Hugging Face folder or a GGUF file
    lora: bool = False  # train low-rank updates of its projections, and not its weights
    lora_rank: int = 16  # r; alpha is twice as large
    gradient_checkpointing: bool = False  # keep one activation per layer, and compute the others again

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"no preset {shown(self.preset)}; the presets are {', '.join(PRESETS)}")
        self._require("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        for name in ("steps", "batch_size", "accumulate", "save_every", "vocab_size"):
            self._require(name, is_int(getattr(self, name), 1), "a whole number from 1")
        for name in ("threads", "context", "hidden_size", "layers", "heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            self._require(name, value is None or is_int(value, 1), "a whole number from 1")
        for name, kinds in (("device", DEVICES), ("precision", PRECISIONS)):
            self._require(name, getattr(self, name) in kinds, f"one of {', '.join(kinds)}")
        peak = self.peak_tflops
        self._require("peak_tflops", peak is None or (is_number(peak) and peak > 0), "a positive number")
        minutes = self.minutes
        self._require("minutes", minutes is None or (is_number(minutes) and minutes > 0), "a positive number")
        for name in ("learning_rate", "gradient_clip"):
            self._require(name, is_number(getattr(self, name)) and getattr(self, name) > 0, "a positive number")
        for name in ("warmup_steps", "seed"):
            self._require(name, is_int(getattr(self, name), 0), "a whole number from 0")
        self._require("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number from 0")
        self._check_rope()
        self._require("lora_rank", is_int(self.lora_rank, 1), "a whole number from 1")
        self._check_init()

    def _check_rope(self) -> None:
        kind, factor, original = self.rope_scaling, self.rope_factor, self.original_context
        self._require("rope_scaling", kind is None or kind in ROPE_TYPES, ", ".join(ROPE_TYPES))
        self._require("rope_factor", factor is None or (is_number(factor) and factor >= 1), "a number from 1")
        self._require("original_context", original is None or is_int(original, 1), "a whole number from 1")
        if (kind is None) != (factor is None):
            raise InputError("--rope-scaling and --rope-factor are given together: give both, or neither")
        if original is not None and kind not in ("yarn", "llama3"):
            raise InputError("--original-context is read by --rope-scaling yarn and llama3: leave it out")
        positions = PRESETS[self.preset].model.get("position_encoding", "rope")
        if kind is not None and positions != "rope":
            raise InputError(
                f"--rope-scaling {kind} needs rotary positions, and those of the preset {self.preset} are {positions}: "
                "leave it out, or choose another preset"
            )

    def _check_init(self) -> None:
        if self.init is None:
            if self.lora:
                raise InputError("--lora is for a model that exists: name it with --init")
            return
        self._require("optimizer", self.optimizer == "adamw", "adamw, which trained what exists")
        for field in dataclasses.fields(self):
            if field.name in OF_A_NEW_MODEL and getattr(self, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                raise InputError(f"{option} is for a new model, and --init {self.init} brings its own: leave it out")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        require(condition, "--" + name.replace("_", "-"), getattr(self, name), expected)

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> TrainConfig:
        """Returns the settings of the preset, or of fine-tuning, replaced by those given."""
        if given.get("steps") is not None and given.get("minutes") is not None:
            raise InputError("--minutes plans the steps: give it or --steps, not both")
        if given.get("init") is not None:
            return cls(**(dict(FINE_TUNING) | (dict(LORA) if given.get("lora") else {}) | dict(given)))
        preset = PRESETS.get(given.get("preset", cls.preset), PRESETS[cls.preset])
        return cls(**(dict(preset.training) | dict(given)))

    def model_config(self, vocab_size: int, bos_token_id: int | None, eos_token_id: int) -> ModelConfig:
        """Returns the decoder's configuration: the preset's, with the given sizes, and the others derived from them."""
        preset = PRESETS[self.preset].model
        hidden_size = self.hidden_size or preset["hidden_size"]
        heads = self.heads or preset["num_attention_heads"]
        shape = dict(preset)
        shape["max_position_embeddings"] = self.context or preset["max_position_embeddings"]
        shape["num_hidden_layers"] = self.layers or preset["num_hidden_layers"]
        shape["hidden_size"] = hidden_size
        shape["intermediate_size"] = preset["intermediate_size"] * hidden_size // preset["hidden_size"]
        shape["num_attention_heads"] = heads
        # If K/V heads are not given, keep the preset's number if it divides the heads.
        fitting = heads % preset["num_key_value_heads"] == 0
        multi_head = preset["num_key_value_heads"] == preset["num_attention_heads"]
        shape["num_key_value_heads"] = self.kv_heads or (
            preset["num_key_value_heads"] if fitting and not multi_head else heads
        )
        resized = self.hidden_size is not None or self.heads is not None
        shape["head_dim"] = self.head_dim or (max(1, hidden_size // heads) if resized else preset["head_dim"])
        shape["rope_scaling"] = self.scaling(shape["max_position_embeddings"])
        return ModelConfig(vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **shape)

    def scaling(self, context: int) -> RopeScaling | None:
        """Returns the scaling of rotary frequencies for a context of so many tokens."""
        if self.rope_scaling is None or self.rope_factor is None:
            return None
        original = None
        if self.rope_scaling in ("yarn", "llama3"):
            original = self.original_context or max(1, int(context / self.rope_factor))
        return parse(
            RopeScaling,
            {"rope_type": self.rope_scaling, "factor": self.rope_factor, "original_max_position_embeddings": original},
        )


# With `init`, in the place of a preset's. LoRA learns best at about ten times the rate of full fine-tuning.
FINE_TUNING: Final[Mapping[str, Any]] = {
    "optimizer": "adamw",
    "steps": 300,
    "batch_size": 4,
    "learning_rate": 5e-5,
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "save_every": 100,
}
LORA: Final[Mapping[str, Any]] = {"learning_rate": 5e-4}
FINE_TUNING_CONTEXT: Final = 512  # tokens, if the model's own is no smaller and none is given
OF_A_NEW_MODEL: Final = (
    "preset", "tokenizer", "vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "rope_scaling",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A kind of decoder, and the training settings that differ for it."""

    summary: str
    model: Mapping[str, Any]  # fields of ModelConfig
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of TrainConfig


_SMALL: Final = {
    "max_position_embeddings": 192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

PRESETS: Final[Mapping[str, Preset]] = {
    "classic": Preset(
        "the smallest decoder: sinusoidal positions and one attention layer with its residual connection",
        {
            "max_position_embeddings": 8,
            "hidden_size": 16,
            "intermediate_size": 0,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "position_encoding": "sinusoidal",
            "norm": "none",
            "mlp": "none",
            "tie_word_embeddings": False,
        },
        {
            "steps": 400,
            "batch_size": 16,
            "optimizer": "adamw",
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "save_every": 400,
            "tokenizer": "word",
        },
    ),
    "gpt2": Preset(
        "learned positions, LayerNorm, GELU, biases",
        _SMALL
        | {
            "intermediate_size": 512,
            "num_key_value_heads": 4,
            "position_encoding": "learned",
            "norm": "layernorm",
            "mlp": "gelu",
            "qkv_bias": True,
            "bias": True,
        },
    ),
    "llama": Preset("RoPE, RMSNorm, SwiGLU, grouped-query attention", _SMALL),
    "qwen2": Preset("llama with bias on queries, keys and values", _SMALL | {"qkv_bias": True}),
    "qwen3": Preset("llama with normalised queries and keys", _SMALL | {"qk_norm": True}),
}
