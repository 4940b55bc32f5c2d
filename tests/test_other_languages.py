"""The examples in other languages, which tests/programs compiles and runs: what they name is what a bundle has."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest, StateGeometry
from pastkey.files.folder import FileRecord

from .shared import ROOT

EXAMPLES = ROOT / "examples"
SYSTEMS = {"android": ("kt", "kts"), "ios": ("swift",)}  # the suffixes of their sources
LENGTHS = {names.SEQLENS_K, names.TOTAL_SEQUENCE_LENGTH}
PHONE_INPUTS = LENGTHS | {names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS, names.LOGITS_START}
# A quoted word of these forms is the name of a tensor, or of its beginning.
TENSOR = re.compile(r'"((?:past_|present|input_|attention_|position_|logits|seqlens_|total_)[\w.]*)"')


def source(system: str, name: str = "") -> str:
    """The text of all sources, or of one."""
    if name:
        (file,) = (EXAMPLES / system).rglob(name)
        return file.read_text(encoding="utf-8")
    files = [file for end in SYSTEMS[system] for file in sorted((EXAMPLES / system).rglob(f"*.{end}"))]
    assert len(files) > 5
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("system", SYSTEMS)
def test_it_feeds_what_the_graphs_have(system):
    named = set(TENSOR.findall(re.sub(r"\\\(i\)", "0", source(system))))
    beginnings = {names.PAST_PREFIX, names.PRESENT_PREFIX, "past_", "present_"}
    caches = {names.past_key(0), names.past_value(0), names.past_conv(0)}
    assert named >= PHONE_INPUTS | {names.LOGITS, names.PAST_PREFIX, names.PRESENT_PREFIX}
    assert named <= PHONE_INPUTS | {names.LOGITS} | beginnings | caches


def test_they_read_fields_that_the_manifest_has():
    read = [re.findall(r'get\w+\("(\w+)"\)', source("android", "Manifest.kt"))]
    named = re.findall(r"let ((?:\w+, )*\w+): (?:Int|String|\[)", source("ios", "Manifest.swift"))
    read.append(", ".join(named).split(", "))
    kinds = (Manifest, KVGeometry, StateGeometry, FileRecord)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for found in read:
        assert {"vocab_size", "context_length", "eos_token_ids", "precision", "size", "sha256", "files"} <= {*found}
        assert {*found} <= fields


def test_the_page_pins_what_the_projects_pin():
    page = (ROOT / "docs" / "apps.md").read_text(encoding="utf-8")
    table = page[page.index("## Android and iOS") : page.index("## A model offline")]
    pins = re.findall(r'"([\w.-]+):([\w.-]+):([\d.]+)"|exact: "([\d.]+)"', "".join(map(source, SYSTEMS)))
    assert len(pins) == 5
    for group, name, version, exact in pins:
        assert (f"`{group}:{name}:{version}`" if name else f" {exact}") in table
    wrapper = (EXAMPLES / "android/gradle/wrapper/gradle-wrapper.properties").read_text(encoding="utf-8")
    (release,) = re.findall(r"gradle-([\d.]+)-bin\.zip", wrapper)
    assert f"Gradle {release}" in table


def test_djl_is_told_not_to_report_its_use():
    before, _, _ = source("android", "Writer.kt").partition("HuggingFaceTokenizer.newInstance")
    assert 'System.setProperty("OPT_OUT_TRACKING", "true")' in before


# --- examples/generate ---------------------------------------------------------------------------------------------
SOURCES = sorted(file.name for file in (EXAMPLES / "generate").iterdir() if file.suffix != ".json")
INPUTS = {names.INPUT_IDS, *names.GENERATE_INTEGERS, *names.GENERATE_NUMBERS}
STATE = {names.HELD_CACHE, names.HELD_IDS, names.NEW_CACHE, names.NEW_IDS}


def code(name: str) -> str:
    """Without comments."""
    text = (EXAMPLES / "generate" / name).read_text(encoding="utf-8")
    return re.sub(r"^\s*//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", SOURCES)
def test_it_feeds_what_the_graph_has(name):
    given = r"^    (\w+):" if name.endswith(".mjs") else r'"(\w*_\w+|temperature|seed)"'
    fed = set(re.findall(given, code(name), re.MULTILINE))
    assert fed == INPUTS
    assert re.search(rf'"{names.GENERATED_IDS}"|{{ {names.GENERATED_IDS}\b', code(name))
    if name == "generate.mjs":  # which streams, too
        assert all(re.search(rf"\b{state}\b", code(name)) for state in STATE)
