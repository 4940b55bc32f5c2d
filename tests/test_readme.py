"""README and docs keep their word: their figures, links, examples and commands are those of the repository."""

from __future__ import annotations

import configparser
import itertools
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.measure import rows_of
from pastkey.__main__ import COMMANDS
from pastkey.contract import names
from pastkey.runtime.providers.ort import onnxruntime
from tools import commands as reference

from .loopback_hub import serving, without_hub
from .runtime.test_options import table
from .shared import ROOT, divided, ran

DOCS = ROOT / "docs"
USERS = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.glob("*.md"))
PAGES = {name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", *USERS)}
PAGES |= {path.relative_to(ROOT).as_posix(): path for path in (DOCS / "dev").glob("*.md")}
MOST_PAGES, MOST_LINES, MOST_WORDS = 20, 3_000, 28_000  # for users, without what is generated
GENERATED = ("docs/cli.md", "docs/api.md")


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def written(page: str) -> str:
    """The page without the blocks that a command or the code writes, and without files that are shown."""
    marked = r"<!-- (?:benchmarks )?(\S+) -->\n.*?<!-- end(?: of \1)? -->"
    return re.sub(marked, "", text_of(page), flags=re.DOTALL)


# --- what is shown ------------------------------------------------------------------------------------------------
def test_the_files_that_are_shown_are_those_of_the_repository():
    shown = [
        pair
        for page in USERS
        for pair in re.findall(r"<!-- (\S+\.?\S*) -->\n```\w+\n(.*?)```\n<!-- end -->", text_of(page), re.DOTALL)
    ]
    assert len(shown) >= 5
    for name, content in shown:
        assert content == (ROOT / name).read_text(encoding="utf-8"), name


def test_the_page_of_options_has_their_table():
    assert table() in text_of("docs/output.md"), table()


def test_the_worked_example_of_the_cache_is_right():
    pytest.importorskip("torch", reason="torch is not installed")
    (example,) = programs("docs/how-it-works.md")
    exec(example, {})


def test_the_bullets_of_the_readme_have_figures_of_the_results():
    results = (ROOT / "benchmarks" / "results-epyc.md").read_text(encoding="utf-8").replace("|", " ").split()
    for word in ("Fast", "Accurate", "Small"):
        bullet = text_of("README.md").split(f"- **{word}.** ")[1].split("\n- ")[0]
        figures_of_bullet = re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])", bullet)
        assert figures_of_bullet
        assert set(figures_of_bullet) <= set(results), word


def test_the_readme_counts_the_families_of_the_tests():
    pytest.importorskip("torch", reason="torch is not installed")
    from .export.families import FAMILIES

    families = {family.partition("+")[0] for family in FAMILIES}  # without the variants
    assert f"{len(families)} Hugging Face families are verified" in text_of("README.md")


def test_the_table_of_precisions_has_figures_of_the_results():
    rows = rows_of((ROOT / "benchmarks" / "results-epyc.md").read_text(encoding="utf-8"), "engine")
    measured = {row["engine"]: (row["MB"], row["KL divergence (nats)"]) for row in rows if "MB" in row}
    page = text_of("docs/export.md")
    for name, engine in (
        ("int8", "int8, without prompt lookup"),
        ("int4", "int4, without prompt lookup"),
        ("fp32", "fp32"),
    ):
        (row,) = re.findall(rf"^\| `{name}`.*\| (\d+) MB \| (\S+) \|$", page, re.MULTILINE)
        assert row == measured[f"pastkey {engine}"], name


def test_the_page_of_commands_is_made_of_their_parsers():
    """With the settings of help that the newest Python has; the text is pastkey's own."""
    assert text_of("docs/cli.md") == reference.put(reference.PAGE, "commands", reference.reference() + "\n")


def test_every_extra_and_every_variable_of_the_environment_is_listed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", text_of("docs/index.md"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == extras.keys()
    stages = (ROOT / stage for stage in ("pastkey", "runtime", "serve", "export", "train", "see", "web"))
    code = "".join(file.read_text(encoding="utf-8") for stage in stages for file in stage.rglob("*.py"))
    section = text_of("docs/cli.md").split("## Environment variables")[1].split("<!-- commands -->")[0]
    listed = set(re.findall(r"`([A-Z_]+)(?:=\w+)?`", section))
    assert set(re.findall(r"PASTKEY_[A-Z_]+", code)) == {name for name in listed if name.startswith("PASTKEY_")}
    outside = {"HF_HOME", "HF_TOKEN", "RAYON_NUM_THREADS"}  # other libraries read them
    assert not [name for name in listed - outside if name not in code]


@pytest.mark.parametrize("graph", ["model_quantized", "pastkey"])
def test_the_graphs_have_the_inputs_and_outputs_of_the_page(graph, classic):
    row = re.compile(r"^\| `(\S+)` \| (\(.*?\)) \| (float32|int64|int32) \|", re.MULTILINE)
    rows = row.findall(text_of("docs/bundle-format.md"))
    assert len(rows) > 8
    page = {name.replace("{i}", "0"): (shape, kind.replace("float32", "float")) for name, shape, kind in rows}
    letters = dict(zip((names.BATCH, names.SEQUENCE, names.PAST, names.TOTAL, names.KEPT), "BTPSN", strict=True))
    session = onnxruntime.InferenceSession(classic / "bundle" / "onnx" / f"{graph}.onnx")
    values = (*session.get_inputs(), *session.get_outputs())
    found = [value for value in values if not re.search(r"\.[1-9]", value.name)]
    assert len(found) >= 8
    for value in found:
        shape, kind = page[value.name]
        assert value.type == f"tensor({kind})"
        dims = [letters.get(dim, "number") for dim in value.shape]
        of_page = [re.findall(r"\w+", one) for one in shape.split(", or ")]
        assert dims in [[dim if dim in "BTPSN" else "number" for dim in one] for one in of_page], value.name


# --- what is named ------------------------------------------------------------------------------------------------
def test_files_that_the_pages_name_exist():
    made = {"tokenizer.json", "config.json", "tokenizer_config.json", "model.safetensors", "pastkey.json", "file.py"}
    made |= {"genai_config.json", "generation_config.json", "encoder.json", "vocab.json", "adapter_config.json"}
    stages = [ROOT / stage for stage in ("export", "runtime", "train", "see")]
    folders = [ROOT, DOCS, *stages, *(folder for stage in stages for folder in stage.rglob("*/"))]
    pattern = r"`([\w/-]+\.(?:py|md|json|safetensors))`"
    named = {name for page in PAGES for name in re.findall(pattern, text_of(page))} - made
    assert len(named) > 50
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def test_links_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
    inside = [(page, link.partition("#")[0]) for page, link in links if "://" not in link]
    assert len(inside) > 20
    assert not [(page, link) for page, link in inside if not (PAGES[page].parent / link).exists()]


def test_the_site_shows_every_page_and_users_read_no_more_than_they_can():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\ntheme:")[0]
    assert sorted(f"docs/{page}" for page in re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == USERS
    texts = [written(page) for page in USERS if page not in GENERATED]
    counts = (len(USERS), sum(text.count("\n") for text in texts), sum(len(text.split()) for text in texts))
    assert all(found <= most for found, most in zip(counts, (MOST_PAGES, MOST_LINES, MOST_WORDS), strict=True)), counts


PARSERS = {name: reference.parser_of(name, row[0]) for name, row in COMMANDS.items()}
# Flags of other programs that the pages name.
THEIRS = {
    "--no-deps", "--wheel-dir", "--local-dir", "--revision", "--model", "--task", "--nproc-per-node", "--nnodes",
    "--rdzv-backend", "--rdzv-endpoint", "--ignore-scripts", "--minimal_build", "--include_ops_by_config", "--tag",
    "--file", "--find-links", "--name", "--rounds", "--page", "--charts", "--reference", "--new-tokens", "--help",
    "--full", "--publish", "--volume",
}  # fmt: skip


def test_commands_and_flags_that_the_pages_name_exist():
    known = {flag for parser in PARSERS.values() for flag in parser._option_string_actions} | THEIRS
    for page in ("README.md", *USERS):
        assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", written(page))) - known, page
        for line in re.findall(r"^ *pastkey (.+)$", written(page), re.MULTILINE):
            name, *words = re.split(r"\s+", line.split(" # ")[0].split("|")[0].split(">")[0].strip())
            if name in PARSERS:
                assert not {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)} - {
                    *PARSERS[name]._option_string_actions
                }, line


def test_the_files_that_deploy_a_server_are_right():
    """The image is not built here, and systemd does not run: their forms, and what they type, are read."""
    docker = (ROOT / "examples" / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in docker.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert {line.split()[0] for line in lines} == known
    typed = [json.loads(line.partition("CMD ")[2]) for line in lines if "CMD [" in line]
    compile(typed[0][2], "healthcheck", "exec")
    assert typed[1][:2] == ["pastkey", "serve"]
    of_image = PARSERS["serve"].parse_args(typed[1][2:])
    assert str(of_image.port) == re.findall(r"^EXPOSE (\d+)$", docker, re.MULTILINE)[0]
    for place in re.findall(r"/pastkey(/\w+)?(?= |$)", "".join(line for line in lines if "pip wheel" in line)):
        assert (ROOT / place.strip("/") / "pyproject.toml").is_file()
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((ROOT / "examples" / "deploy" / "pastkey.service").read_text(encoding="utf-8"))
    assert unit.sections() == ["Unit", "Service", "Install"]
    program, name, *words = shlex.split(unit["Service"]["ExecStart"])
    assert (program.rpartition("/")[2], name) == ("pastkey", "serve")
    assert PARSERS["serve"].parse_args(words).drain_seconds < float(unit["Service"]["TimeoutStopSec"])


# --- what is typed ------------------------------------------------------------------------------------------------
SHELL = """
pastkey() { "$PYTHON" -m pastkey "$@" || { echo "failed: pastkey $*" >&2; exit 1; }; }
"""
MODEL = "path/to/SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def commands(page: str) -> list[str]:
    """The lines of the page's indented blocks that run pastkey, or write what it reads."""
    return re.findall(r"^    ((?:pastkey|printf) .*)$", text_of(page), re.MULTILINE)


def programs(page: str) -> list[str]:
    """The page's blocks of Python, except a file that is shown whole and is run elsewhere."""
    text = re.sub(r"<!-- examples/.*?<!-- end of example -->", "", text_of(page), flags=re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder_of_a_chat_model(tmp_path_factory):
    """A Hugging Face folder with a chat template, of random weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from .export.tiny_llama import TEMPLATE, bpe, llama

    folder = tmp_path_factory.mktemp("source") / "model"
    llama(max_position_embeddings=4096).save_pretrained(folder)
    tokenizer: Any = bpe(bos=True)
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}</s>")  # ends a turn
    tokenizer.save_pretrained(folder)
    return folder


TYPED = (
    "README.md", "docs/chat.md", "docs/devices.md", "docs/export.md", "docs/index.md", "docs/output.md",
    "docs/own-modules.md", "docs/python.md", "docs/security.md", "docs/serve.md", "docs/train.md", "docs/tutorial.md",
)  # fmt: skip
MARK = "\x1e"  # between what two commands print


def printed(page: str) -> Iterator[tuple[int, str]]:
    """The number of the last command before each block of ```text, and the block: what the command prints."""
    text, before = text_of(page), 0
    for block in re.finditer(r"^    (?:pastkey|printf) .*$|^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before += block[1] is None
        if block[1] is not None:
            yield before - 1, block[1]


CHANGES = re.compile(r"…|(?<![a-z\d])\d[\d,.]*(?:e[+-]?\d+)?")  # …, and each number


def fits(block: str, told: str) -> str:
    """The first line of a block that was not told, in order, but for what changes."""
    lines = iter([" ".join(line.split()) for line in told.splitlines()])
    for line in block.splitlines():
        plain = map(re.escape, CHANGES.split(" ".join(line.split())))
        kinds = (".*" if found == "…" else r"[\d,.e+-]+" for found in CHANGES.findall(line))
        pattern = re.compile(
            "".join(part for pair in itertools.zip_longest(plain, kinds, fillvalue="") for part in pair)
        )
        if line.strip(" …") and not any(map(pattern.fullmatch, lines)):
            return line
    return ""


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("page", divided(TYPED, ci=["README.md"]))
def test_the_commands_and_programs_of_a_page_run_in_turn(page, folder_of_a_chat_model, tmp_path):
    """With a tiny model instead of SmolLM2, from a Hub on loopback, and a training of a few steps."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(folder_of_a_chat_model)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = {"pastkey train --out": "--steps 2 --batch-size 1 --layers 1", "pastkey train --init": "--steps 2"}
    lines = [" ".join([line, *(short[start] for start in short if line.startswith(start))]) for line in commands(page)]
    assert lines
    for number, program in enumerate(programs(page)):
        (tmp_path / f"program{number}.py").write_text(program, encoding="utf-8")
    run = [f'"$PYTHON" program{number}.py' for number in range(len(programs(page)))]
    first = 1 if page == "docs/train.md" else 0  # programs that write what the commands read
    told = [f"printf '{MARK}' >&2; {line}" for line in lines]
    script = SHELL + "\n".join([*run[:first], "exec 3>&1 1>&2", *told, f"printf '{MARK}'; exec 1>&3", *run[first:]])
    with serving() as hub:
        hub.add(HUB_ID, folder_of_a_chat_model)
        given = without_hub() | hub.environment(tmp_path) | {"PYTHON": sys.executable}
        done = ran("bash", "-eu", "-o", "pipefail", "-c", script, cwd=tmp_path, env=given, input="Once upon a time\n")
    parts = done.stderr.split(MARK)[1 : len(lines) + 1]
    for number, block in printed(page):
        assert not fits(block, parts[number]), f"{lines[number]} prints another line:\n{parts[number]}"
