"""examples/android and examples/ios, compiled and run on a PC but for their views: they write Python's texts."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.environments import ROOT
from pastkey.runtime import load

from ..runtime import tiny_decoder as decoder
from ..shared import ran
from . import environments, phones
from .environments import had
from .generations import library
from .phones import SAMPLED, Program, answers, call, serving
from .test_generate import java as java  # the binding, and how it is run

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

HERE = Path(__file__).parent
ANDROID, IOS = ROOT / "examples" / "android", ROOT / "examples" / "ios"
KOTLIN = [*(ANDROID / "app" / "src" / "main" / "kotlin").rglob("*.kt")]


@pytest.fixture(scope="module")
def kotlin():
    """The folder of Kotlin's compiler and ktlint, from npm's packages."""
    return environments.node_environment(HERE / "kotlin" / "package.json", "kotlin") / "node_modules"


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """The folder of the class R, which Android's resource compiler makes of the manifest, the layout and the texts."""
    framework = had(environments.install_android_resources(), "aapt is")
    folder, main = tmp_path_factory.mktemp("resources"), ANDROID / "app" / "src" / "main"
    manifest = ElementTree.parse(main / "AndroidManifest.xml")
    manifest.getroot().set("package", "com.example.pastkey")  # Gradle sets it by `namespace`
    manifest.write(folder / "AndroidManifest.xml")
    command: list[str | Path] = ["aapt", "package", "-f", "-m", "-M", folder / "AndroidManifest.xml"]
    command += ["-S", main / "res", "-I", framework, "-J", folder, "-F", folder / "app.apk"]
    ran(*command)
    return folder


@pytest.fixture(scope="module")
def android(tmp_path_factory, java, kotlin, resources):
    """The project and tests/programs/android_program.kt. Of Android itself, the compiler sees stubs."""
    binding, command = java
    folder = tmp_path_factory.mktemp("android")
    stubs = [*(HERE / "android_stubs").rglob("*.java"), *resources.rglob("R.java")]
    ran("javac", "-d", folder / "stubs", *stubs)
    compiler = kotlin / "kotlin-compiler" / "lib"
    compiling: list[str | Path] = ["java", "-cp", compiler / "kotlin-compiler.jar"]
    compiling += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-Werror", "-no-reflect", "-jvm-target", "17"]
    compiling += ["-cp", f"{binding}:{environments.ANDROID_JSON}:{folder / 'stubs'}", "-d", folder / "classes"]
    ran(*compiling, *KOTLIN, HERE / "android_program.kt")
    path = f"{binding}:{environments.ANDROID_JSON}:{folder / 'classes'}:{compiler / 'kotlin-stdlib.jar'}"
    return [*command, path, "Android_programKt"]


def test_ktlint_finds_nothing(kotlin):
    files = [*ANDROID.rglob("*.kt"), *ANDROID.rglob("*.kts")]
    ran(kotlin / "@naturalcycles" / "ktlint" / "resources" / "ktlint", *files, cwd=ANDROID)


def check_texts(program: Program, bundle: Path, folder: Path, prompts: tuple[str, str], long: str) -> None:
    """The program writes Python's texts, up to where it is stopped or the context ends; each mistake is a sentence."""
    calls = [call(prompt, **changes) for changes in SAMPLED for prompt in prompts]
    ends = [call(prompts[1], stop_after=2), call(long, max_new_tokens=99), call(long * 40), call(prompts[1], top_p=0)]
    with serving(bundle) as served, load(bundle, threads=1) as lm:
        *found, stopped, whole, refused, wrong = answers(program, served.url, folder, calls + ends)
        for one, answer in zip(calls, found, strict=True):
            expected = lm.generate(**one, prompt_lookup=False)
            assert "".join(answer["pieces"]) == expected.text
            end = {"stop": "endoftext", "length": "length"}[expected.finish_reason]
            assert answer["ending"].lower().replace("_", "") == end
        assert (len(stopped["pieces"]), stopped["ending"].lower()) == (2, "stopped")
        assert "".join(whole["pieces"]) == lm.generate(long, max_new_tokens=99, prompt_lookup=False).text
        context = lm.manifest.context_length
        assert refused["error"] == f"the prompt has {len(lm.prompt_ids(long * 40))} tokens, the context {context}"
        assert wrong["error"].startswith("topP is ")
        phones.check_vectors(program, served.url, folder)


def test_android_writes_the_texts_of_python(android, bundles, tmp_path):
    bundle = phones.with_old_merges(bundles("llama-fp32"), tmp_path / "served")
    check_texts(android, bundle, tmp_path / "bundle", ("Zoë had", "Tom"), "Tom " * 20)


@pytest.mark.parametrize("program", ["android", "ios"])
def test_a_bundle_is_brought_whole_or_not_at_all(program, letters_bundle, tmp_path, request):
    command = request.getfixturevalue(program)
    phones.check_download(command, letters_bundle, tmp_path / "bundle")
    altered = shutil.copytree(letters_bundle, tmp_path / "altered")
    text = (altered / "tokenizer.json").read_text(encoding="utf-8")
    (altered / "tokenizer.json").write_text(text.replace("WordLevel", "Wordlevel"), encoding="utf-8")
    phones.check_altered(command, altered, tmp_path / "bundle2")


# --- iOS -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def letters_bundle(tmp_path_factory):
    """A decoder of random weights over letters, whose weights are next to the graph."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(decoder.ALPHABET)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tiny = decoder.Tiny.random([(8, 8), (16, 16)], context_length=40)
    folder = tmp_path_factory.mktemp("letters") / "b"
    given = {"tokenizer": tokenizer, "tokenizer_config": {}, "data_file": "model.onnx_data"}
    return decoder.write_bundle(folder, tiny, "fused", **given).path


@pytest.fixture(scope="module")
def ios(tmp_path_factory):
    """The package and tests/programs/ios_program.swift, over stand-ins for the packages of ios_stubs/."""
    had(environments.install_swift(), "Swift is")
    header = had(environments.onnxruntime_header(), "onnxruntime's header is")
    folder = tmp_path_factory.mktemp("ios")
    (folder / "module.modulemap").write_text(f'module COnnxRuntime {{ header "{header}/onnxruntime_c_api.h" }}')
    (folder / "libonnxruntime.so.1").symlink_to(library())
    swift: list[str | Path] = ["swiftc", "-swift-version", "5", "-I", folder, "-Xcc", f"-I{folder}"]
    for stub in sorted((HERE / "ios_stubs").glob("*.swift")):
        made: list[str | Path] = ["-module-name", stub.stem, "-emit-module-path", folder / f"{stub.stem}.swiftmodule"]
        made += ["-emit-library", "-static", "-parse-as-library", "-o", folder / f"lib{stub.stem}.a"]
        ran(*swift, *made, stub)
    linked = [f"-l{stub.stem}" for stub in (HERE / "ios_stubs").glob("*.swift")]
    command: list[str | Path] = [*swift, "-parse-as-library", "-module-name", "PastkeyWriter", "-L", folder, *linked]
    command += ["-l:libonnxruntime.so.1", "-Xlinker", "-rpath", "-Xlinker", folder, "-o", folder / "program"]
    sources = sorted((IOS / "Sources").rglob("*.swift"))
    done = ran(*command, *sources, HERE / "ios_program.swift")
    assert "warning:" not in done.stderr, done.stderr
    return [folder / "program"]


def test_ios_writes_the_texts_of_python(ios, letters_bundle, tmp_path):
    check_texts(ios, letters_bundle, tmp_path / "bundle", ("dog", "ab"), "ab" * 19)


@pytest.mark.parametrize("file", [*IOS.rglob("*.swift"), ROOT / "examples/generate/Generate.swift"], ids=str)
def test_swift_reads_every_source(file):
    """Also the view, which needs Apple's frameworks to be compiled."""
    had(environments.install_swift(), "Swift is")
    ran("swiftc", "-frontend", "-parse", file)
