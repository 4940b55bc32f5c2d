"""The command: one file, or one sentence."""

import pytest

from .conftest import data_of

PROMPT = ("--prompt", "what is statquest")


@pytest.fixture
def page(tmp_path):
    return tmp_path / "page.html"


@pytest.fixture
def look(command, page):
    """look(SOURCE, *FLAGS): the output, and the data of the page."""

    def run(source, *flags):
        status, out, err = command("see", source, *flags, "--out", page)
        assert (status, out) == (0, ""), err
        return err, data_of(page.read_text(encoding="utf-8"))

    return run


@pytest.mark.oldest
@pytest.mark.slow
def test_a_bundle_becomes_a_page(classic, look, page):
    said, data = look(classic / "bundle", *PROMPT, "--title", "My page")
    assert "<h1>My page</h1>" in page.read_text(encoding="utf-8")
    assert said == f"{page}: {page.stat().st_size / 1000:.0f} kB\n"
    assert data["text"]["ended"]
    assert set(data["vocabulary"]) >= {"what", "is", "statquest", "awesome"}
    assert page.stat().st_size < 60_000


@pytest.mark.slow
def test_a_source_is_exported_once_as_for_run_and_compared_with_a_bundle(classic, look, page, monkeypatch):
    asked = []

    def exported(source, **options):
        asked.append((source, options))
        return str(classic / "bundle")

    monkeypatch.setattr("pastkey.exported.exported", exported)
    _, data = look("org/name", *PROMPT, "--reference", classic / "bundle")
    assert (asked, data["reference"]["name"]) == ([("org/name", {"untrusted": False, "chats": False})], "bundle")
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize(("source", "said"), [("checkpoint", "export it first"), ("no.py:make", "no such bundle")])
def test_what_run_does_not_export_either_is_refused(classic, command, page, source, said):
    status, _, err = command("see", classic / source, *PROMPT, "--out", page)
    assert (status, err.count("\n"), page.exists()) == (2, 1, False)
    assert said in err


MISTAKES = {
    "--layers 2": "there is no layer 2: this decoder has 1, from 1 on",
    "--layers 0": "argument --layers: '0' is not a list of numbers from 1, such as 1,2,3",
    "--heads x": "argument --heads: 'x' is not a list of token ids such as 1,2,3",
    "--position 9": "--position 9 is not one of the shown tokens, 1 to 5",
    "--last 257": "--last is 257, and a page shows 256 tokens at most",
    "--top-p 0": "argument --top-p: '0' was given; it must be above 0 and at most 1",
    "--reference nowhere": "no such source: nowhere",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_file(classic, command, page, flags):
    status, _, err = command("see", classic / "bundle", *PROMPT, "--out", page, *flags.split())
    assert (status, err.count("\n"), page.exists()) == (2, 1, False)
    assert err.replace(str(classic / "bundle"), "BUNDLE").startswith(f"pastkey see: {MISTAKES[flags]}")


def test_a_bundle_without_a_tokenizer_takes_ids_and_a_long_text_says_what_is_left_out(bundle_of, command, look, page):
    bundle = bundle_of("llama").path
    status, _, err = command("see", bundle, "--prompt", "a", "--out", page)
    assert (status, "no tokenizer" in err) == (2, True)
    out = page.parent
    assert command("see", bundle, "--prompt-ids", "3", "--out", out)[2].endswith("--out names the file to write\n")
    assert look(bundle, "--prompt-ids", "3,1,4")[1]["vocabulary"][:3] == ["3", "1", "4"]
    flags = ("--last", "4", "--heads", "2", "--max-new-tokens", "3")
    _, data = look(bundle, "--prompt-ids", "3,1,4,1,5,9,2,6", *flags)
    assert (data["text"]["first"], data["attention"]["heads"], data["attention"]["calls"]) == (6, [1], [0, 1])
    assert data["attention"]["weights"]["columns"] == 5
