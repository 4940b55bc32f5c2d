"""The list of a manifest is checked: paths stay inside the folder, sizes and hashes are those that were written."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from pastkey.errors import IntegrityError, MissingFileError, PastkeyError
from pastkey.files import folder as module
from pastkey.files.folder import check_hashes, file_record, leads_out, parse_records, require_manifest

HASH = "6ae90ff6bd11fc6f4ae1a3bb53ba4b7cd5ab0ee8"
SHARED = "ab" + "0" * 62
RECORD = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", "*/x", "", "a" * 1025])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(IntegrityError, match="not a path inside"):
        parse_records(tmp_path, {name: RECORD})


WRONG = [{"a": RECORD | wrong} for wrong in ({"size": -1}, {"size": "1"}, {"sha256": "0"})]


@pytest.mark.parametrize("content", [[], None, {"a": 1}, *WRONG])
def test_a_list_without_sizes_and_hashes_is_refused(tmp_path, content):
    with pytest.raises(IntegrityError, match=r"pastkey\.json has no (size|list)"):
        parse_records(tmp_path, content)


# A link to this target at this place of Hugging Face's cache leads to its own store.
INSIDE = [
    (f"../../blobs/{HASH}", "models--org--name/snapshots/1/a"),
    (f"../../../blobs/{HASH}", "models--org--name/snapshots/1/onnx/a"),
    (f"../../../../blobs/{HASH}", "models--org--name/snapshots/1/snapshots/deeper/a"),
    ("../../blobs/etag", "models--org--name/snapshots/1/a"),  # which is a link to the store of all repositories
    ("real", "bundle/snapshots/1/a"),
]
# The last ones: one too many, next to the repository; absolute; links to another folder and to another one's content.
OUTSIDE = (
    "../../../secret", f"../../other/{HASH}", f"../../models--org--name/blobs/{HASH}", f"../../../blobs/{HASH}",
    f"/models--org--name/blobs/{HASH}", "../../blobs/elsewhere", "../../blobs/wrong",
)  # fmt: skip
PLACE = "models--org--name/snapshots/1/a"
LINKS = [*((*row, True) for row in INSIDE), *((target, PLACE, False) for target in OUTSIDE)]
LINKS.append((f"../../blobs/{HASH}", "mine/snapshots/1/a", False))


def linked(target: str, place: str) -> tuple[Path, Path]:
    """A link in the working folder, where Hugging Face's cache is laid out; and the snapshot that it is in."""
    repository = Path(place.split("/")[0])
    shared = Path("blobs", "ab", SHARED)
    for file in (repository / "blobs" / HASH, repository / "other" / HASH, Path("secret"), Path("blobs", HASH), shared):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("s")
    others = {"etag": f"../../{shared}", "wrong": f"../../blobs/{HASH}", "elsewhere": f"../other/{HASH}"}
    for name, content in others.items():
        (repository / "blobs" / name).symlink_to(content)
    link = Path(place)
    link.parent.mkdir(parents=True, exist_ok=True)
    (link.parent / "real").write_text("s")
    link.symlink_to(str(Path.cwd()) + target if target.startswith("/") else target)
    return link, repository / "snapshots" / "1" if "snapshots" in place else link.parent


@pytest.mark.parametrize(("target", "place", "inside"), LINKS)
def test_only_the_links_of_the_hub_cache_to_its_own_store_are_followed(target, place, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link, snapshot = linked(target, place)
    (tmp_path / "named").symlink_to(snapshot)
    named = tmp_path / "named" / link.relative_to(snapshot)
    assert leads_out(link, snapshot) == leads_out(named, tmp_path / "named") == (not inside)
    (snapshot / "elsewhere").symlink_to(tmp_path)
    assert leads_out(snapshot / "elsewhere" / "secret", snapshot)
    record = {link.relative_to(snapshot).as_posix(): file_record(tmp_path / "secret")}
    refused = pytest.raises(IntegrityError, match=r"leads out of the folder|is missing")
    with contextlib.nullcontext() if inside else refused:
        module.check_sizes(snapshot, record)
    assert module.hub_files(snapshot) == ([link.resolve()] if inside and "blobs" in target else [])


@pytest.mark.parametrize("place", ["relative", "/proc/none", "a file", None])
def test_without_a_place_for_the_cache_hashes_are_checked_and_not_remembered(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if place is None:  # as in a container whose user has a number and no name
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if place == "a file" else place or "")
    (tmp_path / "a").write_text("right")
    records = {"a": file_record(tmp_path / "a")}
    check_hashes(tmp_path, records)
    (tmp_path / "a").write_text("wrong")
    with pytest.raises(IntegrityError, match="a was altered"):
        check_hashes(tmp_path, records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_a_cache_that_is_no_json_or_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "\udce9"  # a path that is no text is not remembered
    folder.mkdir()
    (folder / "a").write_text("right")
    records = {"a": file_record(folder / "a")}
    check_hashes(folder, records)
    assert list((tmp_path / "cache" / "pastkey").iterdir()) == []
    check_hashes(folder.rename(tmp_path / "named"), records)
    (remembered,) = (tmp_path / "cache" / "pastkey").iterdir()
    for content in (b"[" * 100_000, b"\xff", b"{", b"[1]", b'{"x": 3}'):
        remembered.write_bytes(content)
        check_hashes(tmp_path / "named", records)


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a"
    file.write_text("right")
    records = {"a": file_record(file)}
    check_hashes(tmp_path, records)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", lambda path: "another")
        check_hashes(tmp_path, records)
        with pytest.raises(IntegrityError, match="a was altered"):
            check_hashes(tmp_path, records, remembered=False)
    file.write_text("wrong")
    with pytest.raises(IntegrityError, match="a was altered"):
        check_hashes(tmp_path, records)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("m.gguf", "type  pastkey export m.gguf --out bundle  (it needs pastkey's extras export,huggingface)"),
        ("a b", "type  pastkey export 'a b' --out bundle  (it needs pastkey's extras export,huggingface)"),
        ("a b/model.safetensors", "type  pastkey export 'a b' --out bundle  (it"),
        ("org/name-1.5B", "type  pastkey export org/name-1.5B --out bundle  (it needs pastkey's extras export,hugg"),
    ],
)
def test_a_model_of_another_form_comes_with_the_command_that_exports_it(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    Path("a b").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("a b", name).write_text("{}")
    with pytest.raises(PastkeyError, match=re.escape(words)):
        require_manifest(Path(given), "bundle")
    with pytest.raises(PastkeyError, match=r"(a folder|exist|pastkey\.json)$"):
        require_manifest(Path(given), "checkpoint")


IDS = ["HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "TheBloke/Llama-2-7B-GGUF"]
NO_IDS = [
    "gpt2", "./a/b", "/a/b", "a/b/c", "a/b/", "../a", "~/models", "a\\b", "a/b c", "a/b--c", "a/b..c", "a/é",
    "models/model.gguf", f"a/{'b' * 97}", "here/model", "folder/model",
]  # fmt: skip


@pytest.mark.parametrize("text", [*IDS, *NO_IDS])
def test_an_id_of_the_hub(tmp_path, monkeypatch, text):
    """ORG/NAME in the Hub's own letters, where neither that path nor a folder ORG exists."""
    monkeypatch.chdir(tmp_path)
    Path("here", "model").mkdir(parents=True)
    Path("folder").mkdir()
    assert module.hub_id(text) == (text if text in IDS else None)


@pytest.mark.parametrize("text", ["org/x@main", "https://huggingface.co/org/x/tree/main", "https:/hf.co/org/x"])
def test_an_address_on_the_hub_is_told_as_an_id(text):
    with pytest.raises(MissingFileError, match=r"does not exist; .* write org/x, which"):
        require_manifest(Path(text), "bundle")
    for other in ("org/x", "http://example.com/org/x", "./org/x@main"):
        assert module.hub_hint(other) == ""
