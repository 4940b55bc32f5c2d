"""What a manifest lists is checked: paths stay inside the folder, sizes and hashes are those that were written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pastkey.errors import IntegrityError, MissingFileError, PastkeyError
from pastkey.files.folder import (
    check_hashes,
    check_sizes,
    file_record,
    hub_files,
    hub_hint,
    hub_id,
    leads_out,
    parse_records,
    read_json,
    require_manifest,
)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(IntegrityError, match="not a path inside"):
        parse_records(tmp_path, {name: {"size": 1, "sha256": "0"}})


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="leads out of the folder"):
        check_sizes(folder, {"a": file_record(tmp_path / "secret")})


HASH = "6ae90ff6bd11fc6f4ae1a3bb53ba4b7cd5ab0ee8"


def linked(target: str, place: str = "models--org--name/snapshots/1/a") -> tuple[Path, Path]:
    """A link in a snapshot of Hugging Face's cache, which is laid out here, and the snapshot."""
    repository = Path(place.split("/")[0])
    for file in (repository / "blobs" / HASH, repository / "other" / HASH, Path("secret")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("s")
    link = Path(place)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link, repository / "snapshots" / "1"


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (f"../../blobs/{HASH}", "models--org--name/snapshots/1/a"),
        (f"../../../blobs/{HASH}", "models--org--name/snapshots/1/onnx/a"),
        (f"../../../../blobs/{HASH}", "models--org--name/snapshots/1/onnx/deeper/a"),
        (f"../../../../blobs/{HASH}", "models--org--name/snapshots/1/snapshots/deeper/a"),
        (f"../../blobs/{HASH}", "datasets--org--name/snapshots/1/a"),
    ],
)
def test_the_links_of_the_hub_cache_lead_to_its_own_store(target, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link, snapshot = linked(target, place)
    assert link.read_text() == "s"
    assert not leads_out(link, snapshot)
    check_sizes(snapshot, {link.relative_to(snapshot).as_posix(): file_record(link)})
    (tmp_path / "named").symlink_to(snapshot)
    assert not leads_out(tmp_path / "named" / link.relative_to(snapshot), tmp_path / "named")


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("../../../secret", "models--org--name/snapshots/1/a"),
        (f"../../other/{HASH}", "models--org--name/snapshots/1/a"),
        (f"../../../blobs/{HASH}", "models--org--name/snapshots/a"),  # one too many: beside the repository
        (f"../../blobs/../blobs/{HASH}", "models--org--name/snapshots/1/a"),
        (f"../../blobs/{HASH}", "mine/snapshots/1/a"),
        (f"../../models--org--name/blobs/{HASH}", "models--org--name/snapshots/1/a"),
        (f"../blobs/{HASH}", "models--org--name/1/a"),
    ],
)
def test_any_other_link_to_a_store_leads_out(target, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / HASH).write_text("s")
    link, _ = linked(target, place)
    assert leads_out(link, link.parent)


def test_an_absolute_link_to_the_store_leads_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link, snapshot = linked(str(tmp_path / "models--org--name" / "blobs" / HASH))
    assert leads_out(link, snapshot)


def test_a_store_whose_content_lies_elsewhere_leads_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link, snapshot = linked(f"../../blobs/{HASH}")
    blob = tmp_path / "models--org--name" / "blobs" / HASH
    blob.unlink()
    blob.symlink_to(tmp_path / "models--org--name" / "other" / HASH)
    assert link.read_text() == "s"
    assert leads_out(link, snapshot)


def test_a_file_behind_a_linked_folder_leads_out_and_a_link_within_does_not(tmp_path):
    folder = tmp_path / "bundle"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (tmp_path / "elsewhere" / "a").write_text("a")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (folder / "real").write_text("a")
    (folder / "link").symlink_to("real")
    assert leads_out(folder / "sub" / "a", folder)
    assert not leads_out(folder / "link", folder)
    assert not leads_out(folder / "real", folder)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": \udcff}', "{", '{"a": "\x00"}', "[]", ""]
)
def test_what_is_no_json_object_is_told_in_a_sentence(content, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(IntegrityError, match=r"a\.json (is not valid JSON|holds a JSON)"):
        read_json(file)


def test_without_a_home_folder_hashes_are_checked_and_not_remembered(tmp_path, monkeypatch):
    """As in a container whose user has a number and no name."""
    pwd = pytest.importorskip("pwd")

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    file = tmp_path / "a"
    file.write_text("right")
    records = {"a": file_record(file)}
    check_hashes(tmp_path, records)
    file.write_text("wrong")
    with pytest.raises(IntegrityError, match="a was altered"):
        check_hashes(tmp_path, records)


@pytest.mark.parametrize("place", ["relative", "", "/proc/none", "a file"])
def test_without_a_place_for_the_cache_hashes_are_checked(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if place == "a file" else place)
    monkeypatch.setenv("HOME", "")
    folder = tmp_path / "\udce9"  # a name that is no UTF-8
    folder.mkdir()
    (folder / "a").write_text("right")
    check_hashes(folder, {"a": file_record(folder / "a")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", folder.name]


def test_a_cache_that_is_no_json_or_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    folder = tmp_path / "\udce9"
    folder.mkdir()
    (folder / "a").write_text("right")
    records = {"a": file_record(folder / "a")}
    check_hashes(folder, records)  # a path that is no text is not remembered
    assert list((cache / "pastkey").iterdir()) == []
    named = tmp_path / "named"
    folder.rename(named)
    check_hashes(named, records)
    (remembered,) = (cache / "pastkey").iterdir()
    for content in (b"[" * 100_000, b"\xff", b"{", b"[1]", b'{"x": 3}'):
        remembered.write_bytes(content)
        check_hashes(named, records)


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a"
    file.write_text("right")
    records = {"a": file_record(file)}
    check_hashes(tmp_path, records)
    hashed: list[Path] = []

    def spy(path: Path) -> str:
        hashed.append(path)
        return records["a"].sha256

    monkeypatch.setattr("pastkey.files.folder.sha256", spy)
    check_hashes(tmp_path, records)
    assert hashed == []
    check_hashes(tmp_path, records, remembered=False)
    assert hashed == [file]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_text("wrong")
    with pytest.raises(IntegrityError, match="a was altered"):
        check_hashes(tmp_path, records)


def in_hub_cache(cache: Path, *, shared: bool) -> Path:
    """A folder of Hugging Face's cache with one file, whose content may lie in the store of all repositories."""
    digest = "ab" + "0" * 62
    repository = cache / "models--a--b"
    folder = repository / "snapshots" / "0123"
    for place in (folder / "onnx", repository / "blobs", cache / "blobs" / "ab"):
        place.mkdir(parents=True)
    (folder / "onnx" / "file").symlink_to("../../../blobs/etag")
    if shared:
        (cache / "blobs" / "ab" / digest).write_text("content")
        (repository / "blobs" / "etag").symlink_to(f"../../blobs/ab/{digest}")
    else:
        (repository / "blobs" / "etag").write_text("content")
    return folder


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_a_hubs_cache(tmp_path, shared):
    """To its own stores, and nowhere else."""
    folder = in_hub_cache(tmp_path, shared=shared)
    file = folder / "onnx" / "file"
    assert not leads_out(file, folder)
    assert hub_files(folder) == [file.resolve()]
    (tmp_path / "secret").write_text("secret")
    (folder / "beside").symlink_to("../../../secret")
    blob = tmp_path / "models--a--b" / "blobs" / "etag"
    blob.unlink()
    blob.symlink_to("../../secret")
    assert leads_out(file, folder)
    assert leads_out(folder / "beside", folder)
    assert hub_files(folder) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("m.gguf", "type  pastkey export m.gguf --out bundle  (it needs pastkey's extras export,gguf)"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("a/b", True),
        ("TheBloke/Llama-2-7B-GGUF", True),
        ("gpt2", False),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a/b/", False),
        ("../a", False),
        ("~/models", False),
        ("a\\b", False),
        ("a/b c", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("a/é", False),
        ("models/model.gguf", False),
        (f"a/{'b' * 97}", False),
        ("here/model", False),
        ("folder/model", False),
    ],
)
def test_an_id_of_the_hub(tmp_path, monkeypatch, text, expected):
    """ORG/NAME in the Hub's own letters, where neither that path nor a folder ORG exists."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here", "model").mkdir()
    Path("folder").mkdir()
    assert hub_id(text) == (text if expected else None)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("org/x@main", "org/x"),
        ("https://huggingface.co/org/x/tree/main", "org/x"),
        ("https:/hf.co/org/x.y", "org/x.y"),
        ("org/x", None),
        ("http://example.com/org/x", None),
        ("./org/x@main", None),
    ],
)
def test_an_address_on_the_hub_is_told_as_an_id(text, known):
    assert (f"write {known}, which" in hub_hint(text)) if known else hub_hint(text) == ""
    with pytest.raises(MissingFileError, match=f"does not exist; .* {known}, which" if known else "does not exist"):
        require_manifest(Path(text), "bundle")
