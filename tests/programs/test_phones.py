"""examples/android and examples/ios, compiled and run on a PC but for their views: they write Python's texts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.environments import ROOT
from pastkey.runtime import load

from ..runtime import conftest as decoder
from .environments import ANDROID_JSON, install_android_resources, install_swift, node_environment, onnxruntime_header
from .generations import library
from .phones import SAMPLED, answers, call, check_altered, check_download, check_vectors, serving, with_old_merges
from .test_generate import java as java  # the binding, and how it is run

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

HERE = Path(__file__).parent
ANDROID, IOS = ROOT / "examples" / "android", ROOT / "examples" / "ios"
KOTLIN = [*(ANDROID / "app" / "src" / "main" / "kotlin").rglob("*.kt")]


@pytest.fixture(scope="module")
def kotlin():
    """The folder of Kotlin's compiler and ktlint, from npm's packages."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    return node_environment(HERE / "kotlin" / "package.json", "kotlin") / "node_modules"


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """The folder of the class R, which Android's resource compiler makes of the manifest, the layout and the texts."""
    if (framework := install_android_resources()) is None:
        pytest.skip("aapt is not installed; PASTKEY_INSTALL=1 installs Debian's")
    folder, main = tmp_path_factory.mktemp("resources"), ANDROID / "app" / "src" / "main"
    manifest = ElementTree.parse(main / "AndroidManifest.xml")
    manifest.getroot().set("package", "com.example.pastkey")  # Gradle sets it by `namespace`
    manifest.write(folder / "AndroidManifest.xml")
    command: list[str | Path] = ["aapt", "package", "-f", "-m", "-M", folder / "AndroidManifest.xml"]
    command += ["-S", main / "res", "-I", framework, "-J", folder, "-F", folder / "app.apk"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def android(tmp_path_factory, java, kotlin, resources):
    """The project and tests/programs/android_program.kt. Of Android itself, the compiler sees stubs."""
    binding, command = java
    folder = tmp_path_factory.mktemp("android")
    stubs = [*(HERE / "android_stubs").rglob("*.java"), *resources.rglob("R.java")]
    subprocess.run(["javac", "-d", folder / "stubs", *stubs], check=True)
    compiler = kotlin / "kotlin-compiler" / "lib"
    compiling: list[str | Path] = ["java", "-cp", compiler / "kotlin-compiler.jar"]
    compiling += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-Werror", "-no-reflect", "-jvm-target", "17"]
    compiling += ["-cp", f"{binding}:{ANDROID_JSON}:{folder / 'stubs'}", "-d", folder / "classes"]
    done = subprocess.run(
        [*compiling, *KOTLIN, HERE / "android_program.kt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    path = f"{binding}:{ANDROID_JSON}:{folder / 'classes'}:{compiler / 'kotlin-stdlib.jar'}"
    return [*command, path, "Android_programKt"]


def test_ktlint_finds_nothing(kotlin):
    files = [*ANDROID.rglob("*.kt"), *ANDROID.rglob("*.kts")]
    command = [kotlin / "@naturalcycles" / "ktlint" / "resources" / "ktlint", *files]
    done = subprocess.run(command, cwd=ANDROID, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_android_writes_the_texts_of_python(android, bundles, tmp_path):
    bundle = with_old_merges(bundles("llama-fp32"), tmp_path / "served")
    calls = [call(prompt, **changes) for changes in SAMPLED for prompt in ("Zoë had", "Tom")]
    ends = [call("Tom", stop_after=2), call("Tom " * 20, max_new_tokens=99), call("Tom " * 600), call("Tom", top_p=0)]
    with serving(bundle) as served, load(bundle, threads=1) as lm:
        *found, stopped, whole, long, wrong = answers(android, served.url, tmp_path / "bundle", calls + ends)
        for one, answer in zip(calls, found, strict=True):
            expected = lm.generate(**one, prompt_lookup=False)
            assert "".join(answer["pieces"]) == expected.text
            assert answer["tokens"] == expected.new_tokens
            assert answer["ending"] == {"stop": "END_OF_TEXT", "length": "LENGTH"}[expected.finish_reason]
        assert (len(stopped["pieces"]), stopped["ending"]) == (2, "STOPPED")
        expected = lm.generate("Tom " * 20, max_new_tokens=99)
        assert (whole["tokens"], "".join(whole["pieces"])) == (expected.new_tokens, expected.text)
        assert long["error"] == f"the prompt has {len(lm.prompt_ids('Tom ' * 600))} tokens, the context 64"
        assert wrong["error"] == "topP is 0.0; it must be above 0 and at most 1"
        check_vectors(android, served.url, tmp_path / "bundle")


def test_android_runs_the_int8_graph(android, bundles, tmp_path):
    bundle = with_old_merges(bundles("llama"), tmp_path / "served")
    with serving(bundle) as served, load(bundle, threads=1) as lm:
        (found,) = answers(android, served.url, tmp_path / "bundle", [call("Zoë had")])
        assert "".join(found["pieces"]) == lm.generate("Zoë had", max_new_tokens=24, prompt_lookup=False).text


def test_android_brings_a_bundle_whole_or_not_at_all(android, letters_bundle, tmp_path):
    check_download(android, letters_bundle, tmp_path / "bundle")
    check_altered(android, altered(letters_bundle, tmp_path / "altered"), tmp_path / "bundle2")


# --- iOS -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def letters_bundle(tmp_path_factory):
    """A decoder of random weights over letters, whose weights lie beside the graph."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(decoder.ALPHABET)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tiny = decoder.Tiny.random([(8, 8), (16, 16)], context_length=40)
    folder = tmp_path_factory.mktemp("letters") / "b"
    given = {"tokenizer": tokenizer, "tokenizer_config": {}, "data_file": "model.onnx_data"}
    return decoder.write_bundle(folder, tiny, "fused", **given).path


def altered(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace("WordLevel", "Wordlevel"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ios(tmp_path_factory):
    """The package and tests/programs/ios_program.swift, over stand-ins for the packages of ios_stubs/."""
    header = onnxruntime_header()
    if sys.platform != "linux" or header is None or install_swift() is None:
        pytest.skip("Swift or onnxruntime's header is not installed; PASTKEY_INSTALL=1 installs Debian's")
    folder = tmp_path_factory.mktemp("ios")
    (folder / "module.modulemap").write_text(f'module COnnxRuntime {{ header "{header}/onnxruntime_c_api.h" }}')
    (folder / "libonnxruntime.so.1").symlink_to(library())
    swift: list[str | Path] = ["swiftc", "-swift-version", "5", "-I", folder, "-Xcc", f"-I{folder}"]
    for stub in sorted((HERE / "ios_stubs").glob("*.swift")):
        made: list[str | Path] = ["-module-name", stub.stem, "-emit-module-path", folder / f"{stub.stem}.swiftmodule"]
        made += ["-emit-library", "-static", "-parse-as-library", "-o", folder / f"lib{stub.stem}.a"]
        subprocess.run([*swift, *map(str, made), stub], check=True)
    linked = [f"-l{stub.stem}" for stub in (HERE / "ios_stubs").glob("*.swift")]
    command: list[str | Path] = [*swift, "-parse-as-library", "-module-name", "PastkeyWriter", "-L", folder, *linked]
    command += ["-l:libonnxruntime.so.1", "-Xlinker", "-rpath", "-Xlinker", folder, "-o", folder / "program"]
    sources = sorted((IOS / "Sources").rglob("*.swift"))
    done = subprocess.run([*command, *sources, HERE / "ios_program.swift"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" not in done.stderr, done.stderr
    return [folder / "program"]


@pytest.mark.matrix
def test_ios_writes_the_texts_of_python(ios, letters_bundle, tmp_path):
    calls = [call(prompt, **changes) for changes in SAMPLED for prompt in ("ab", "dog")]
    ends = [call("ab", stop_after=2), call("ab" * 19, max_new_tokens=99), call("ab" * 60), call("ab", top_p=0)]
    with serving(letters_bundle) as served, load(letters_bundle, threads=1) as lm:
        *found, stopped, whole, long, wrong = answers(ios, served.url, tmp_path / "bundle", calls + ends)
        for one, answer in zip(calls, found, strict=True):
            assert "".join(answer["pieces"]) == lm.generate(**one, prompt_lookup=False).text
            assert answer["ending"] == "length"
        assert (len(stopped["pieces"]), stopped["ending"]) == (2, "stopped")
        assert "".join(whole["pieces"]) == lm.generate("ab" * 19, max_new_tokens=99, prompt_lookup=False).text
        assert long["error"] == "the prompt has 120 tokens, the context 40"
        assert wrong["error"] == "topP is out of range"
        check_vectors(ios, served.url, tmp_path / "bundle")


@pytest.mark.matrix
def test_ios_brings_a_bundle_whole_or_not_at_all(ios, letters_bundle, tmp_path):
    check_download(ios, letters_bundle, tmp_path / "bundle")
    check_altered(ios, altered(letters_bundle, tmp_path / "altered"), tmp_path / "bundle2")


@pytest.mark.matrix
@pytest.mark.parametrize("file", [*IOS.rglob("*.swift"), ROOT / "examples/generate/Generate.swift"], ids=str)
def test_swift_reads_every_source(file):
    """The view, too, which needs Apple's frameworks to be compiled."""
    if install_swift() is None:
        pytest.skip("Swift is not installed; PASTKEY_INSTALL=1 installs Debian's")
    done = subprocess.run(["swiftc", "-frontend", "-parse", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
