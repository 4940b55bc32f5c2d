"""`pastkey batch` as it is typed: rows in, rows with answers out, whatever ends it in the middle."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from pastkey.__main__ import main
from pastkey.bundle import Bundle
from pastkey.runtime import load
from pastkey.runtime.bulk.job import job_folder
from pastkey.runtime.bulk.requests import seed_of
from pastkey.runtime.commands.batch import counted_tokens
from pastkey.runtime.session_file import bundle_digest

from ..bulk.rows import TEMPLATE, plain_rows, read_rows, write_rows

if TYPE_CHECKING:
    from ..conftest import Tiny

FLAGS = ["--threads", "1", "--temperature", "1", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def talking(tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE})


def batch(bundle: Bundle, source: Path, out: Path, *flags: str) -> int:
    return main(["batch", str(bundle.path), str(source), "--out", str(out), *FLAGS, *flags])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1, sentence
    assert all(word in sentence for word in words), sentence


def test_rows_of_every_kind_are_answered_and_reported(
    talking: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "/v1/chat/completions"
    said = [{"role": "user", "content": "hi"}]
    rows: list[Any] = [
        *plain_rows(5),
        {"prompt": "ab", "max_new_tokens": 2, "temperature": 0},
        {"id": "m", "messages": said},
        "no json",
        {"id": "bad", "prompt": 5},
        {"custom_id": "o", "url": url, "body": {"messages": said, "max_tokens": 3}},
    ]
    out = tmp_path / "out.jsonl"
    assert batch(talking, write_rows(tmp_path / "in.jsonl", rows), out, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "10 of 10 rows, 2 with an error" in captured.err
    made = read_rows(out)
    model = load(talking.path, threads=1)
    for row in made[:5]:
        answer = model.generate(row["prompt"], seed=seed_of(0, row["id"]), temperature=1.0, max_new_tokens=9)
        assert (row["text"], row["new_tokens"], row["error"]) == (answer.text, answer.new_tokens, None)
    assert (made[5]["id"], made[5]["new_tokens"]) == ("line-6", 2)
    assert made[6]["text"]
    assert [row.get("error") is not None for row in made] == [False] * 7 + [True] * 2 + [False]
    assert made[9]["response"]["body"]["usage"]["completion_tokens"] == 3
    new = sum(row["new_tokens"] or 0 for row in made[:9]) + 3
    assert {name: report[name] for name in ("out", "rows", "errors", "resumed", "new_tokens", "bundle")} == {
        "out": str(out),
        "rows": 10,
        "errors": 2,
        "resumed": 0,
        "new_tokens": new,
        "bundle": bundle_digest(talking),
    }
    assert report["rows_per_second"] > 0
    assert batch(talking, tmp_path / "in.jsonl", out) == 0
    captured = capsys.readouterr()
    assert "is complete: nothing was left to do" in captured.err
    assert "10 rows, 2 with an error" in captured.out


@pytest.mark.slow
def test_a_job_that_is_terminated_goes_on(talking: Bundle, tmp_path: Path) -> None:
    """By SIGTERM and by Ctrl-C, each time when a few rows more are written."""
    source, out = write_rows(tmp_path / "in.jsonl", plain_rows(250)), tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    assert batch(talking, source, whole) == 0
    command = [sys.executable, "-m", "pastkey", "batch", str(talking.path), str(source), "--out", str(out), *FLAGS]
    written = job_folder(out) / "rows.jsonl"
    before = 0
    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (written.exists() and written.stat().st_size > before):
                time.sleep(0.001)
            process.send_signal(number)
            said = process.communicate()[1]
        if process.returncode == 0:
            pytest.skip("this machine answers 250 rows between two looks at a file")
        assert process.returncode == status, said
        assert "of 250 rows are answered: the same command goes on" in said
        assert not out.exists()
        before = written.stat().st_size
        assert before
    assert batch(talking, source, out) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_shards_give_what_the_whole_gives(talking: Bundle, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", plain_rows(21))
    parts = [tmp_path / f"{part}.jsonl" for part in (1, 2)]
    assert batch(talking, source, tmp_path / "whole.jsonl") == 0
    for part, out in enumerate(parts, 1):
        assert batch(talking, source, out, "--shard", f"{part}/2") == 0
    rows = sorted(read_rows(parts[0]) + read_rows(parts[1]), key=lambda row: row["id"])
    assert rows == read_rows(tmp_path / "whole.jsonl")


def test_parquet_rows_stay_parquet(talking: Bundle, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = plain_rows(20)
    lines = write_rows(tmp_path / "in.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert batch(talking, lines, tmp_path / "out.jsonl") == 0
    assert batch(talking, tmp_path / "in.parquet", tmp_path / "out.parquet") == 0
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == read_rows(tmp_path / "out.jsonl")


def test_what_is_asked_for_once_holds_for_all_rows(talking: Bundle, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", plain_rows(4))
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    assert batch(talking, source, tmp_path / "a.jsonl", "--logprobs", "1", "--exact", "--template", str(template)) == 0
    assert all(len(row["logprobs"]) == row["new_tokens"] == 9 for row in read_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_one_of_several(
    talking: Bundle, tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "in.jsonl", plain_rows(2))
    assert batch(talking, source, tmp_path / "o.jsonl", f"--shard={shard}") == 2
    told(capsys, f"--shard is '{shard}'; I/N was expected")


def test_mistakes_are_one_sentence(talking: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", plain_rows(2)), tmp_path / "o.jsonl"
    assert batch(talking, tmp_path / "none", out) == 2
    told(capsys, "no such file")
    assert batch(talking, source, out, "--temperature", "-1") == 2
    told(capsys, "temperature is -1")
    assert main(["batch", str(tmp_path), str(source), "--out", str(out)]) == 2
    told(capsys, "is not a bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    out.write_text("mine")
    assert batch(talking, source, out) == 2
    told(capsys, "already exists")


def test_tokens_are_counted_in_both_forms() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    assert counted_tokens({"response": {"body": {"usage": usage}}}) == {"prompt_tokens": 3, "new_tokens": 2}
    assert counted_tokens({"prompt_tokens": 3, "new_tokens": 0}) == {"prompt_tokens": 3, "new_tokens": 0}
    assert counted_tokens({"response": None, "error": "x"}) == {"prompt_tokens": 0, "new_tokens": 0}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal_shows_a_bar(talking: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    import fcntl
    import pty
    import termios

    source = write_rows(tmp_path / "in.jsonl", plain_rows(3))
    command = [
        sys.executable,
        "-m",
        "pastkey",
        "batch",
        str(talking.path),
        str(source),
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.run([*command, *FLAGS], stderr=inner, stdout=subprocess.PIPE, check=False)
    os.close(inner)
    shown = os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert done.returncode == 0
    assert "3/3" in shown
    assert "errors=0" in shown
