"""Text in, text out, by onnxruntime with onnxruntime-extensions; and tokenizers that these read otherwise."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import MissingExtraError
from pastkey.export import Report, export
from pastkey.export.generation import text as text_module
from pastkey.export.generation.text import ReadsOtherwiseError, library, text_operators
from pastkey.export.generation.write import settings
from pastkey.export.graph.session import cpu_session
from pastkey.runtime import SamplingConfig
from pastkey.train.tokenizer import train_bpe, train_char

from ..decoders import Plain

WORDS = "once upon a time there was a little dog who said hello to everyone naïve Größe 日本語 don't 1234 🙂"


def lines() -> list[str]:
    choose = random.Random(1)
    return [" ".join(choose.choice(WORDS.split()) for _ in range(12)) + "\n" for _ in range(300)]


def byte_level(folder: Path) -> Path:
    train_bpe(lines(), 400).save(folder)
    return folder / "tokenizer.json"


def sentencepiece(folder: Path) -> Path:
    package = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("".join(lines()), encoding="utf-8")
    package.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "mine"), vocab_size=400, hard_vocab_limit=False,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / "mine.model"


def made(folder: Path, tokenizer: Path) -> Report:
    module = Plain(vocab=420, context=40)
    return export(module, folder / "bundle", "fp32", tokenizer=tokenizer, context_length=40, generate=True)


def feeds(prompt, *given):
    return settings(*given) | {names.TEXT: np.array([prompt], object)}


@pytest.mark.oldest
@pytest.mark.parametrize("kind", [byte_level, pytest.param(sentencepiece, marks=pytest.mark.slow)])
def test_one_call_takes_a_text_and_gives_the_runtimes(kind, tmp_path):
    report = made(tmp_path, kind(tmp_path))
    assert [warning for warning in report.warnings if "text.onnx" in warning] == []
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    session, lm = cpu_session(bundle.path / names.TEXT_GRAPH, library=library()), pastkey.load(bundle.path, threads=1)
    assert names.INPUT_IDS not in {value.name for value in session.get_inputs()}
    for prompt in ("once upon", "Größe 日本語", "  1234\n 🙂x", "a<", "once <", "x <|end", "<s"):
        for config in (SamplingConfig(seed=0), SamplingConfig(temperature=1.5, seed=3)):
            expected = lm.generate(prompt, max_new_tokens=16, temperature=config.temperature, seed=config.seed)
            given = feeds(prompt, config, 16, bundle.manifest.eos_token_ids)
            ids, completion = session.run([names.GENERATED_IDS, names.COMPLETION], given)
            ended = expected.finish_reason == "stop"
            assert ids.tolist()[: len(ids) - ended] == expected.ids
            # The number of U+FFFD for a run of SentencePiece's bytes that is not text depends on the decoder.
            if kind is byte_level or "\N{REPLACEMENT CHARACTER}" not in expected.text + completion[0]:
                assert completion[0] == expected.text


def test_the_end_token_is_no_part_of_the_text_which_may_be_empty(tmp_path):
    bundle = made(tmp_path, byte_level(tmp_path)).path
    session = cpu_session(bundle / names.TEXT_GRAPH, library=library())
    outputs = [names.GENERATED_IDS, names.COMPLETION]
    ids, completion = session.run(outputs, feeds("once", SamplingConfig(seed=0), 0))
    assert (ids.size, completion.tolist()) == (0, [""])
    tokenizer = Tokenizer.from_file(str(bundle / names.TOKENIZER))
    config = SamplingConfig(temperature=1.0, seed=4)
    free = session.run(["ids"], feeds("once", config, 12))[0].tolist()
    end = free[5]
    ids, completion = session.run(outputs, feeds("once", config, 12, (end,)))
    before = free[: free.index(end)]
    assert ids.tolist() == [*before, end]
    assert completion[0] == tokenizer.decode(before)


def test_a_tokenizer_that_is_read_otherwise_is_refused_with_the_text(tmp_path):
    train_char(lines()).save(tmp_path)
    report = made(tmp_path, tmp_path / "tokenizer.json")
    (said,) = (warning for warning in report.warnings if "text.onnx" in warning)
    assert "is not made: onnxruntime-extensions does not read this tokenizer exactly: " in said
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert names.GENERATE_GRAPH in bundle.manifest.files
    assert names.TEXT_GRAPH not in bundle.manifest.files
    with pytest.raises(ReadsOtherwiseError):
        text_operators(bundle)


def test_without_the_package_its_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(MissingExtraError, match="pip install onnxruntime-extensions"):
        text_module.library()
