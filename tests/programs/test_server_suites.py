"""Suites of others on `pastkey serve`: schemathesis on its OpenAPI description, and lm_eval's local-completions."""

from __future__ import annotations

import json
import math
import os

import pytest

from benchmarks.environments import environment

from ..shared import ran
from .serving import MODEL, serving, write_tiny

pytest.importorskip("starlette", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow

SCHEMATHESIS = ("schemathesis", ["schemathesis>=4.32"])
LM_EVAL = ("lm-eval", ["lm_eval[api]==0.4.13", "transformers"])
WINDOW, WINDOWS = 12, 10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("served") / "bundle").path


@pytest.mark.matrix
def test_the_server_keeps_to_its_openapi_description(bundle, tmp_path):
    """No status 5xx, none that is not described, and no reply of another shape.

    Left out: a check that whatever fits a schema is answered. A prompt may be empty, or a tool's answer missing.
    """
    with serving(bundle, "--alias", MODEL, "--default", "max_new_tokens=2", log=tmp_path / "log") as address:
        phases = "coverage,fuzzing,stateful"
        command = ["run", f"{address}/openapi.json", "--phases", phases, "--max-examples", "20", "--seed", "1"]
        command += ["--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--no-color"]
        program = environment(*SCHEMATHESIS).parent / "schemathesis"
        ran(program, *command, cwd=tmp_path, timeout=900)
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


TASK = """\
task: windows
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{{{begin}}}}"
doc_to_target: "{{{{rest}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


@pytest.mark.matrix
def test_lm_eval_scores_as_the_eval_command_does(bundle, tmp_path, pastkey_command):
    """A document of each window: its first token is given, the others are scored, as in `pastkey eval`."""
    sentences = " ".join(f"No. {place}: we sow corn, you mix cool drinks." for place in range(20))
    letters = enumerate(sentences[: WINDOW * WINDOWS])  # lm_eval moves a space at a beginning to the scored text
    text = "".join("_" if letter == " " and not place % WINDOW else letter for place, letter in letters)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    windows = [text[place : place + WINDOW] for place in range(0, len(text), WINDOW)]
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"begin": one[:1], "rest": one[1:]}) + "\n" for one in windows)
    (tmp_path / "windows.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"), encoding="utf-8")

    told = pastkey_command("eval", bundle, "--text", tmp_path / "text.txt", "--length", WINDOW, "--json")
    assert told.returncode == 0, told.stderr
    loss = math.log(json.loads(told.stdout)["perplexity"])

    with serving(bundle, "--alias", MODEL, log=tmp_path / "log") as address:
        given = {"model": MODEL, "base_url": f"{address}/v1/completions", "tokenizer": bundle, "num_concurrent": 2}
        words = ["run", "--model", "local-completions", "--tasks", "windows", "--include_path", str(tmp_path)]
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
        words += ["--output_path", str(tmp_path / "out.json")]
        own = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OPENAI_API_KEY": "any"}
        ran(environment(*LM_EVAL), "-m", "lm_eval", *words, cwd=tmp_path, env=own, timeout=600)
    (results,) = tmp_path.glob("out*.json")
    perplexity = json.loads(results.read_text())["results"]["windows"]["perplexity,none"]
    # lm_eval's perplexity is of a document, pastkey's of a token.
    assert math.log(perplexity) / (WINDOW - 1) == pytest.approx(loss, rel=1e-4)
