"""A trained hybrid keeps its accuracy in int8 and int4, and its error does not grow along the text."""

import itertools

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.runtime import Engine
from pastkey.train.stories import stories

CONTEXT, STEPS = 512, 150
CONFIG = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip

pytestmark = [pytest.mark.matrix, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def text() -> np.ndarray:
    """Built-in stories as bytes."""
    told = "\n".join(itertools.islice(stories(seed=0), 4000))
    return np.frombuffer(told.encode(), np.uint8).astype(np.int64)


@pytest.fixture(scope="module")
def trained():
    """A hybrid of transformers' own class after STEPS steps on the stories' bytes: some minutes."""
    torch.manual_seed(0)
    data, rng = text()[:-20_000], np.random.default_rng(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3_5TextConfig(**CONFIG), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(STEPS):
        ids = torch.from_numpy(np.stack([data[at : at + 129] for at in rng.integers(0, len(data) - 129, 16)]))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(loss) < 1.7  # of bytes; log(256) is 5.5
    return model.eval()


def log_probabilities(engine: Engine, ids: np.ndarray) -> np.ndarray:
    engine.reset()
    logits = engine.all_logits(ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("precision", "most"), [("int8", 1e-4), ("int4", 2e-3)])
def test_the_error_of_a_quantized_hybrid_does_not_grow_along_the_text(trained, precision, most, tmp_path):
    engines = []
    for one in ("fp32", precision):
        export(trained, tmp_path / one, precision=one, context_length=CONTEXT)
        engines.append(Engine(open_bundle(tmp_path / one), threads=2))
    kl = []
    for at in range(0, 10_000, 500):
        ids = text()[-20_000:][at : at + 500]
        expected, found = (log_probabilities(engine, ids) for engine in engines)
        kl.append((np.exp(expected) * (expected - found)).sum(-1))
    along = np.mean(kl, 0).reshape(10, 50).mean(1)
    assert along.mean() < most
    assert along[5:].mean() < 1.3 * along[:5].mean()
