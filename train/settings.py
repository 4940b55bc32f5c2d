"""Every setting of training, defined once: defaults, presets, and the model's configuration derived from them.

Does not import torch, so that the command line can show all settings at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pastkey.contract.config import ModelConfig, RopeScaling, RopeType
from pastkey.errors import InputError
from pastkey.typed import Between, Natural, Positive, Size, check, parse
from pastkey.values import require, shown


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


def _setting(default: Any, group: str, what: str, metavar: str = "N") -> Any:
    """A field with its flag: the heading, its help, and the word for its value."""
    return dataclasses.field(default=default, metadata={"group": group, "help": what, "metavar": metavar})


_INIT: Final = "fine-tune an existing model"
_MODEL: Final = "the decoder (default: the preset's sizes)"
_TRAINING: Final = "training"
_HARDWARE: Final = "hardware"
_KINDS: Final = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())


@dataclass(frozen=True)
class TrainConfig:
    """The settings of training, and the flags of `pastkey train`. Sizes that are None are the preset's."""

    init: str | None = _setting(None, _INIT, "a checkpoint, a Hugging Face folder or a GGUF file to fine-tune", "MODEL")
    lora: bool = _setting(False, _INIT, "train a LoRA adapter, which `export` merges, instead of all weights")
    lora_rank: Size = _setting(16, _INIT, "rank of the adapter; alpha is twice as large")
    preset: str = _setting("llama", _MODEL, _KINDS, "NAME")
    context: Size | None = _setting(None, _MODEL, "context length in tokens")
    hidden_size: Size | None = _setting(None, _MODEL, "width of the residual stream")
    layers: Size | None = _setting(None, _MODEL, "attention layers")
    heads: Size | None = _setting(None, _MODEL, "query heads")
    kv_heads: Size | None = _setting(None, _MODEL, "key and value heads, a divisor of the query heads")
    head_dim: Size | None = _setting(None, _MODEL, "size of a head")
    rope_scaling: RopeType | None = _setting(
        None, _MODEL, "linear, dynamic, yarn or llama3, for a longer context", "KIND"
    )
    rope_factor: Annotated[float, Between(1, 1e9)] | None = _setting(
        None, _MODEL, "how much longer the context gets", "X"
    )
    original_context: Size | None = _setting(
        None, _MODEL, "context before scaling, for yarn and llama3 (default: context / X)"
    )
    tokenizer: str = _setting("bpe", _MODEL, "bpe, char, word, or the path of a tokenizer.json", "KIND")
    vocab_size: Size = _setting(1024, _MODEL, "largest number of tokens, for bpe and word")
    steps: Size = _setting(450, _TRAINING, "optimizer steps")
    minutes: Positive | None = _setting(None, _TRAINING, "plan as many steps as this time allows", "X")
    batch_size: Size = _setting(24, _TRAINING, "windows of text per batch")
    accumulate: Size = _setting(1, _TRAINING, "batches per step")
    optimizer: Literal["muon", "adamw"] = _setting(
        "muon", _TRAINING, "muon for the matrices of projections and adamw for all else, or adamw for all", "NAME"
    )
    # Of AdamW; Muon makes steps in proportion.
    learning_rate: Positive = _setting(3.5e-3, _TRAINING, "peak learning rate, after the warm-up", "X")
    warmup_steps: Natural = _setting(40, _TRAINING, "steps until the peak learning rate, at most a quarter of all")
    weight_decay: Annotated[float, Between(0, math.inf)] = _setting(
        0.1, _TRAINING, "weight decay of AdamW, on projections only", "X"
    )
    gradient_clip: Positive = _setting(1.0, _TRAINING, "largest norm of all gradients together", "X")
    save_every: Size = _setting(90, _TRAINING, "steps between checkpoints, each with validation, sample and curve")
    seed: Natural = _setting(0, _TRAINING, "seed of weights, batches and stories")
    threads: Size | None = _setting(None, _TRAINING, "threads of torch")
    gradient_checkpointing: bool = _setting(False, _TRAINING, "less memory, a third slower")
    device: Literal["auto", "cpu", "cuda", "mps"] = _setting(
        "auto", _HARDWARE, "auto (CUDA if there is a card), cpu, cuda or mps", "NAME"
    )
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", _HARDWARE, "of matrix products: auto (bfloat16 where CUDA has it), float32 or bfloat16", "NAME"
    )
    peak_tflops: Positive | None = _setting(
        None, _HARDWARE, "peak of one device in 10^12 operations per second (default: by the card's name)", "X"
    )
    compile: bool | None = _setting(None, _HARDWARE, "compile the layers by torch.compile (default: on CUDA)")
    shard: bool = _setting(False, _HARDWARE, "divide the model among the processes (FSDP2)")

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"no preset {shown(self.preset)}; the presets are {', '.join(PRESETS)}")
        check(self, flags=True)
        self._check_rope()
        self._check_init()

    def _check_rope(self) -> None:
        kind, factor, original = self.rope_scaling, self.rope_factor, self.original_context
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
        require(self.optimizer == "adamw", "--optimizer", self.optimizer, "adamw, which trained the existing model")
        for field in dataclasses.fields(self):
            if field.name in OF_A_NEW_MODEL and getattr(self, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                raise InputError(f"{option} is for a new model, and --init {self.init} has its own: leave it out")

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


# With `init`, instead of a preset's. LoRA learns best at about ten times the rate of full fine-tuning.
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
