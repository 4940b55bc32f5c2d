"""The decoder's configuration: one flat frozen dataclass, under Hugging Face's names, validated here.

`to_json` writes a config.json that transformers can read if one of its architectures computes the same:
Llama, Qwen2 (bias on q, k, v) and Qwen3 (normalised queries and keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from ..typed import Between, Size, TokenId, check, parse
from ..values import require

PositionEncoding = Literal["rope", "learned", "sinusoidal"]
Norm = Literal["rmsnorm", "layernorm", "none"]
Mlp = Literal["swiglu", "gelu", "none"]
RopeType = Literal["linear", "dynamic", "yarn", "llama3"]

_ORIGINAL: Final = "original_max_position_embeddings"
# The further keys of each kind, as transformers has them.
ROPE_TYPES: Final[Mapping[RopeType, tuple[str, ...]]] = {
    "linear": (),
    "dynamic": (),
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
    "llama3": (_ORIGINAL, "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for a longer context: transformers' `rope_scaling`, under its names.

    "Turns" are those of a pair within the original context. `dynamic` scales nothing up to max_position_embeddings,
    and lets transformers go beyond.
    """

    rope_type: RopeType
    factor: Annotated[float, Between(1, 1e9)]  # frequencies are divided by it: all (linear), or those of few turns
    original_max_position_embeddings: Size | None = None  # yarn, llama3: the context before scaling, in tokens
    attention_factor: Annotated[float, Between(1e-9, 1e9)] | None = None  # yarn: of cos and sin; None: by `factor`
    beta_fast: Annotated[float, Between(1e-9, 1e9)] = 32.0  # yarn: pairs of more turns keep their frequency
    beta_slow: Annotated[float, Between(1e-9, 1e9)] = 1.0  # yarn: pairs of fewer turns are scaled in full
    low_freq_factor: Annotated[float, Between(1e-9, 1e9)] = 1.0  # llama3: pairs of fewer turns are scaled in full
    high_freq_factor: Annotated[float, Between(1e-9, 1e9)] = 4.0  # llama3: pairs of more turns keep their frequency

    def __post_init__(self) -> None:
        check(self)
        own = {"rope_type", "factor", *ROPE_TYPES[self.rope_type]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(field.name in own or value == field.default, field.name, value, f"left out with {self.rope_type}")
        original = self.original_max_position_embeddings
        require(_ORIGINAL not in own or original is not None, _ORIGINAL, original, "a whole number from 1")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            least, most = getattr(self, low), getattr(self, high)
            require(most > least, high, most, f"a number above {low} ({least})")

    def to_json(self) -> dict[str, Any]:
        """The keys of this kind that are set."""
        names = ("rope_type", "factor", *ROPE_TYPES[self.rope_type])
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder-only transformer. Sizes count elements, never bytes."""

    vocab_size: Size  # V
    max_position_embeddings: Size = 256  # the context length, in tokens
    hidden_size: Size = 192
    intermediate_size: Annotated[int, Between(0)] = 512  # width of the MLP; 0 without one
    num_hidden_layers: Annotated[int, Between(1, 1000)] = 4
    num_attention_heads: Size = 6  # H
    num_key_value_heads: Size = 3  # K, divides H; K < H is grouped-query attention
    head_dim: Size = 32  # D
    position_encoding: PositionEncoding = "rope"
    rope_theta: Annotated[float, Between(1e-30, 1e30)] = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None
    norm: Norm = "rmsnorm"
    norm_eps: Annotated[float, Between(1e-30, 1e30)] = 1e-5
    mlp: Mlp = "swiglu"
    qkv_bias: bool = False  # bias on the query, key and value projections
    bias: bool = False  # bias on every other projection
    qk_norm: bool = False  # RMSNorm over each query and key head, before the rotation
    tie_word_embeddings: bool = True  # the output head is the token embedding
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        check(self)
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        require(
            (self.intermediate_size >= 1) == (self.mlp != "none"),
            "intermediate_size",
            self.intermediate_size,
            "0 without an MLP and at least 1 with one",
        )
        rotary = self.position_encoding == "rope"
        even = self.head_dim % 2 == 0 or not rotary
        require(even, "head_dim", self.head_dim, "an even number, since rotary positions rotate pairs")
        require(
            self.rope_scaling is None or rotary,
            "rope_scaling",
            self.rope_scaling,
            f"left out: the positions are {self.position_encoding}, not rotary",
        )
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(value is None or value < self.vocab_size, name, value, "a token id or null")

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture that computes the same, or "pastkey" if there is none."""
        llama_like = (
            self.position_encoding == "rope" and self.norm == "rmsnorm" and self.mlp == "swiglu" and not self.bias
        )
        if not llama_like or (self.qkv_bias and self.qk_norm):
            return "pastkey"
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        own = dataclasses.asdict(self)
        del own["rope_scaling"]
        if self.rope_scaling is not None:
            own["rope_scaling"] = self.rope_scaling.to_json()
        return own | _derived(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Reads the object of `to_json`. Raises InputError on unknown, missing or invalid keys."""
        derived = _derived(cls(vocab_size=1))  # of Llama, which has all of these keys
        return parse(cls, {key: value for key, value in content.items() if key not in derived}, "config.json")


def _derived(config: ModelConfig) -> dict[str, Any]:
    """Returns further keys that transformers reads, derived from the configuration."""
    architectures = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "pastkey": "Decoder",
    }
    derived: dict[str, Any] = {
        "architectures": [architectures[config.model_type]],
        "model_type": config.model_type,
        "torch_dtype": "float32",
    }
    if config.model_type != "pastkey":
        derived |= {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "attention_bias": False,  # transformers' qwen2 has its bias built in
            "mlp_bias": False,
            # transformers 5 reads this; 4.57 silently ignores it and reads rope_theta and rope_scaling
            "rope_parameters": (config.rope_scaling.to_json() if config.rope_scaling else {"rope_type": "default"})
            | {"rope_theta": config.rope_theta},
        }
    return derived
