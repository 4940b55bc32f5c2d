"""The graphs of a whole generation in programs of other languages: the ids of pastkey's own runtime."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pastkey.contract import names
from tools import web_assets

from ..shared import ran
from .environments import had, install_kotlin, java_binding, node_environment, onnxruntime_header
from .generations import BUNDLES, CONTEXT, EXAMPLES, FLOAT32, VOCABULARY, answers_of, calls, expected, library

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

HERE = Path(__file__).parent


def node(package: str) -> Path:
    """The folder of a package for Node, with the example in it."""
    if package == "onnxruntime-web":
        folder = had(web_assets.install(), "npm is")
    else:
        folder = node_environment(EXAMPLES / "generate" / "package.json", "generate")
    for file in (EXAMPLES / "generate" / "generate.mjs", HERE / "generate_example.mjs"):
        shutil.copy(file, folder)
    return folder


def in_node(package: str, graph: Path, wanted: Sequence[tuple[list[int], dict[str, Any], int]]) -> list[dict[str, Any]]:
    """The result of each call of (prompt, settings, chunk); a chunk of 0 is a call of the whole generation."""
    script = node(package) / "generate_example.mjs"
    done = ran("node", script, package, graph, json.dumps(wanted), timeout=300)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("package", "name"),
    [("onnxruntime-node", name) for name in BUNDLES] + [("onnxruntime-web", name) for name in FLOAT32],
)
def test_one_call_and_streamed_chunks_in_node_give_the_ids_of_python(bundles, package, name):
    bundle = bundles(name)
    for graph, chunks in ((names.GENERATE_GRAPH, (0,)), (names.GENERATE_STEP_GRAPH, (1, 3))):
        wanted = [(one.prompt, one.settings(), chunk) for chunk in chunks for one in calls()]
        answers = in_node(package, bundle / graph, wanted)
        assert [answer.get("ids", answer) for answer in answers] == expected(bundle) * len(chunks)


# The graph's error for a call (prompt, settings, chunk), and the program's for one that the graph would accept.
BAD: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "Name:'temperature must be a number from 0 to 2**127'": ([5], {"temperature": -1}, 0),
    "Name:'top_k must be 0 or more'": ([5], {"topK": -1}, 0),
    "Name:'top_p must be above 0 and at most 1'": ([5], {"topP": 0}, 0),
    "Name:'min_p must be between 0 and 1'": ([5], {"minP": 1.5}, 0),
    "Name:'repetition_penalty must be above 0 and at most 2**127'": ([5], {"repetitionPenalty": 0}, 0),
    "Name:'seed must be 0 or more'": ([5], {"seed": -1}, 0),
    "Name:'max_new_tokens must be 0 or more'": ([5], {"maxNewTokens": -1}, 0),
    f"Name:'token ids must be 0 to {VOCABULARY - 1}'": ([5, VOCABULARY], {}, 0),
    f"Name:'the text is longer than the context of {CONTEXT} tokens'": ([5] * (CONTEXT + 1), {}, 0),
    f"the text is longer than the context of {CONTEXT} tokens'": ([5] * (CONTEXT + 2), {}, 1),
    "Name:'input_ids must hold at least one token'": ([], {}, 0),
    "no setting tempreture; there are maxNewTokens, endIds, ": ([5], {"tempreture": 1}, 1),
    "18446744073709551616 is no whole number of 64 bits": ([5], {"seed": str(2**64)}, 1),
    "chunk is -1; a whole number from 1 was expected": ([5], {}, -1),
}


def test_bad_input_is_a_sentence_in_node(bundles):
    bundle = bundles("generate-fp32")
    for graph, streams in ((names.GENERATE_GRAPH, False), (names.GENERATE_STEP_GRAPH, True)):
        cases = {sentence: given for sentence, given in BAD.items() if bool(given[2]) == streams}
        answers = in_node("onnxruntime-node", bundle / graph, [*cases.values()])
        for sentence, answer in zip(cases, answers, strict=True):
            assert sentence in answer["error"]


@pytest.fixture(scope="module")
def c_program(tmp_path_factory):
    """examples/generate/generate.c, compiled, with the library next to it."""
    had(shutil.which("gcc"), "gcc is")
    header = had(onnxruntime_header(), "onnxruntime's header is")
    folder = tmp_path_factory.mktemp("c")
    (folder / "libonnxruntime.so.1").symlink_to(library())
    source = [EXAMPLES / "generate" / "generate.c", "-o", folder / "generate"]
    ran("gcc", "-Wall", "-Wextra", "-Werror", "-I", header, *source, "-L", folder, "-l:libonnxruntime.so.1")
    return folder / "generate"


@pytest.mark.parametrize("name", BUNDLES)
def test_one_call_in_c_gives_the_ids_of_python(bundles, name, c_program):
    bundle, wanted = bundles(name), calls()
    found = answers_of([c_program], bundle / names.GENERATE_GRAPH, wanted, LD_LIBRARY_PATH=str(c_program.parent))
    assert found == expected(bundle)


@pytest.fixture(scope="module")
def java(tmp_path_factory):
    """A binding for Java, and how it is run on the library of Python's package."""
    if shutil.which("gcc") is None or platform.machine() != "x86_64":
        pytest.skip("gcc is not installed, or there is no binding for Java to be had for this processor")
    binding = had(java_binding(), "a JDK is")
    folder = tmp_path_factory.mktemp("java")
    shutil.copy(binding / "libonnxruntime4j_jni.so", folder)
    (folder / "versions").write_text("VERS_1.17.0 { global: Ort*; local: *; };")
    source = [HERE / "onnxruntime_1_17.c", "-o", folder / "libonnxruntime.so"]
    linked = ["-Wl,-soname,libonnxruntime.so.1.17.0", f"-Wl,--version-script={folder / 'versions'}", "-ldl"]
    ran("gcc", "-Wall", "-shared", "-fPIC", *source, *linked)
    return binding, ["java", f"-Donnxruntime.native.path={folder}", "-cp"]


@pytest.fixture(scope="module")
def java_program(tmp_path_factory, java):
    """The command of examples/generate/Generate.java, compiled."""
    binding, command = java
    folder = tmp_path_factory.mktemp("classes")
    ran("javac", "-cp", binding, "-d", folder, EXAMPLES / "generate" / "Generate.java")
    return [*command, f"{binding}:{folder}", "Generate"]


@pytest.fixture(scope="module")
def kotlin_program(tmp_path_factory, java):
    """The command of examples/generate/Generate.kt, compiled."""
    binding, command = java
    home = had(install_kotlin(), "Kotlin's compiler is")
    folder = tmp_path_factory.mktemp("classes")
    standard = "/usr/share/java/kotlin-stdlib.jar:/usr/share/java/kotlin-stdlib-jdk7.jar"
    source = EXAMPLES / "generate" / "Generate.kt"
    ran("kotlinc", "-cp", f"{binding}:{standard}", "-d", folder, source, env=os.environ | {"JAVA_HOME": str(home)})
    return [*command, f"{binding}:{folder}:{standard}", "GenerateKt"]


@pytest.mark.parametrize("language", ["java", "kotlin"])
@pytest.mark.parametrize("name", ["generate-fp32", "generate-int8"])
def test_one_call_in_java_and_kotlin_gives_the_ids_of_python(bundles, name, language, request):
    program: list[str] = request.getfixturevalue(f"{language}_program")
    bundle, wanted = bundles(name), calls()[::2]  # of every way of choosing
    found = answers_of(program, bundle / names.GENERATE_GRAPH, wanted, ONNXRUNTIME=str(library()))
    assert found == expected(bundle)[::2]
