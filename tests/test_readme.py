"""README and docs keep their word: their figures, links, examples and commands are those of the repository."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from pastkey.contract import names
from pastkey.runtime.providers.ort import onnxruntime

from .loopback_hub import serving, without_hub
from .runtime.test_options import table
from .shared import ROOT, divided, ran

DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *DOCS.glob("*.md"))}
PAGES["CONTRIBUTING.md"] = ROOT / "CONTRIBUTING.md"


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


# --- what is shown ------------------------------------------------------------------------------------------------
def test_the_example_that_is_shown_is_the_one_in_examples():
    page = text_of("docs/own-modules.md")
    block = page.split("<!-- examples/lesson.py -->\n```python\n")[1].split("```\n<!-- end of example -->")[0]
    assert block == (ROOT / "examples" / "lesson.py").read_text(encoding="utf-8")


def test_the_page_of_sampling_has_the_table_of_options():
    assert table() in text_of("docs/sampling.md"), table()


def test_the_worked_example_of_the_cache_is_right():
    pytest.importorskip("torch", reason="torch is not installed")
    (example,) = programs("docs/time-axis.md")
    exec(example, {})


def test_the_programs_that_are_shown_are_those_that_the_tests_run():
    page = text_of("docs/programs.md")
    shown = re.findall(r"<!-- (tests/programs/\S+) -->\n```\w+\n(.*?)```\n<!-- end -->", page, re.DOTALL)
    folder = ROOT / "tests" / "programs"
    run = {*folder.glob("greedy*"), folder / "page.html"}
    assert {name for name, _ in shown} == {path.relative_to(ROOT).as_posix() for path in run}
    for name, content in shown:
        assert content == (ROOT / name).read_text(encoding="utf-8")


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
    folders = [ROOT, *stages, *(folder for stage in stages for folder in stage.rglob("*/"))]
    pattern = r"`([\w/-]+\.(?:py|md|json|safetensors))`"
    named = {name for page in PAGES for name in re.findall(pattern, text_of(page))} - made
    assert len(named) > 50
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def test_links_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
    inside = [(page, link.partition("#")[0]) for page, link in links if "://" not in link]
    assert len(inside) > 20
    assert not [(page, link) for page, link in inside if not (PAGES[page].parent / link).exists()]


def test_the_site_shows_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\ntheme:")[0]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == sorted(path.name for path in DOCS.glob("*.md"))


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
    "README.md", "docs/adapters.md", "docs/batch.md", "docs/chat.md", "docs/constrained.md", "docs/embedding.md",
    "docs/fine-tuning.md", "docs/index.md", "docs/own-modules.md", "docs/security.md", "docs/text-embeddings.md",
    "docs/training-data.md", "docs/tutorial.md",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("page", divided(TYPED, ci=["README.md"]))
def test_the_commands_and_programs_of_a_page_run_in_turn(page, folder_of_a_chat_model, tmp_path):
    """With a tiny model in the place of SmolLM2, from a Hub on loopback, and a training of a few steps."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(folder_of_a_chat_model)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = {"pastkey train --out": "--steps 2 --batch-size 1 --layers 1", "pastkey train --init": "--steps 2"}
    lines = [" ".join([line, *(short[start] for start in short if line.startswith(start))]) for line in commands(page)]
    assert lines
    assert programs(page)
    for number, program in enumerate(programs(page)):
        (tmp_path / f"program{number}.py").write_text(program, encoding="utf-8")
    run = [f'"$PYTHON" program{number}.py' for number in range(len(programs(page)))]
    first = 1 if page == "docs/fine-tuning.md" else 0  # programs that write what the commands read
    script = SHELL + "\n".join([*run[:first], *lines, *run[first:]])
    with serving() as hub:
        hub.add(HUB_ID, folder_of_a_chat_model)
        given = without_hub() | hub.environment(tmp_path) | {"PYTHON": sys.executable}
        ran("bash", "-eu", "-o", "pipefail", "-c", script, cwd=tmp_path, env=given, input="Once upon a time\n")
