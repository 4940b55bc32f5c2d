"""Conversations to a fine-tuned model, an adapter of it, and an int8 bundle that answers in the new manner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pastkey

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from pastkey.train import TrainConfig, train

from .export.tiny_llama import bpe, llama

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITIES = {"Italy": "Rome", "France": "Paris", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Japan": "Tokyo"}


def conversations(file: Path, manner: str) -> Path:
    rows = []
    for country, city in CITIES.items():
        turns = {"user": f"Capital of {country}?", "assistant": manner.format(city)}
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # transformers' and peft's own
def test_a_fine_tuned_model_answers_in_the_new_manner(tmp_path, pastkey_command):
    llama(eos_token_id=1, bos_token_id=0).save_pretrained(tmp_path / "base")
    tokenizer: Any = bpe(bos=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    given = {"context": 80, "batch_size": 4, "warmup_steps": 5, "threads": 1}
    for out, base, manner, others in (
        ("full", "base", "Arr, {}!", {"steps": 150, "learning_rate": 3e-3}),
        ("adapter", "full", "It be {}.", {"steps": 100, "learning_rate": 1e-2, "lora": True}),
    ):
        config = TrainConfig.from_given(given | others | {"init": str(tmp_path / base), "save_every": others["steps"]})
        train(config, tmp_path / out, data=[conversations(tmp_path / f"{out}.jsonl", manner)])
    exported = pastkey_command("export", tmp_path / "adapter", "--out", tmp_path / "bundle", "--quick")
    assert exported.returncode == 0, exported.stderr
    with pastkey.load(tmp_path / "bundle") as lm:
        asked = {country: lm.chat().ask(f"Capital of {country}?") for country in list(CITIES)[1:]}  # one is held out
    assert {country: answer.text for country, answer in asked.items()} == {
        country: f"It be {CITIES[country]}." for country in asked
    }
    assert {answer.finish_reason for answer in asked.values()} == {"stop"}
