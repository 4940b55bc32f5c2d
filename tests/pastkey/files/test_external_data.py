"""Every place of an ONNX graph that may name a file is found, and only listed files next to the graph are accepted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import IntegrityError
from pastkey.files.durable import write_json
from pastkey.files.external_data import (
    CHILDREN,
    ExternalData,
    check_contexts,
    check_external_data,
    check_heads,
    external_data,
)
from pastkey.files.folder import FileRecord, file_record, file_records, parse_records
from pastkey.precisions import PRECISIONS

from ...onnx_text import field
from ..contract.test_bundle import MANIFEST

DATA = "model.onnx_data"
GRAPH = PRECISIONS["fp32"].graph
MEMORY = "*/_ORT_MEM_ADDR_/*"  # an address in memory to onnxruntime


def tensor(location: str = DATA, offset: int | str = 16, length: int | str = 48) -> onnx.TensorProto:
    made = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[12])
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        made.external_data.add(key=key, value=value)
    return made


def model_of(*nodes: onnx.NodeProto, **parts: Any) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], **parts))


def hidden(place: str, found: onnx.TensorProto) -> onnx.ModelProto:
    """A model with the tensor at a path of fields, and nothing else."""
    model = onnx.ModelProto(ir_version=10)
    message: Any = model
    for name in place.split("."):
        field = getattr(message, name)
        message = field.add() if hasattr(field, "add") else field
    message.CopyFrom(found)
    return model


ATTRIBUTE = "graph.node.attribute"
PLACES = (
    "graph.initializer", "graph.sparse_initializer.values", "graph.sparse_initializer.indices",
    f"{ATTRIBUTE}.t", f"{ATTRIBUTE}.tensors",
    f"{ATTRIBUTE}.sparse_tensor.values", f"{ATTRIBUTE}.sparse_tensors.indices",
    f"{ATTRIBUTE}.g.initializer", f"{ATTRIBUTE}.graphs.initializer", f"graph{25 * '.node.attribute.g'}.initializer",
    "functions.node.attribute.t", "functions.attribute_proto.t", "training_info.algorithm.initializer",
)  # fmt: skip


def write(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    """A bundle's folder with this graph and 64 bytes next to it."""
    (folder / "onnx").mkdir(parents=True)
    (folder / GRAPH).write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    (folder / "onnx" / DATA).write_bytes(bytes(64))
    return folder


def check(folder: Path) -> None:
    """Checks the graph; the manifest lists every file of the folder, and an entry that is no file."""
    listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    records = {name: file_record(folder / name) for name in listed}
    check_external_data(folder, records | {f"onnx/{MEMORY}": FileRecord(64, "")})


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_a_tensor_may_stand(place, tmp_path):
    good = write(tmp_path / "good", hidden(place, tensor()))
    assert list(external_data(good / GRAPH)) == [ExternalData(DATA, 16, 48)]
    check(good)
    check(write(tmp_path / "dotted", hidden(place, tensor(f"./{DATA}"))))
    with pytest.raises(IntegrityError, match=r"reads weights from '\.\./\.\./secret', which is not a file"):
        check(write(tmp_path / "bad", hidden(place, tensor("../../secret"))))


@pytest.mark.parametrize("verify", [True, False])
def test_a_bundle_is_opened_only_where_its_graphs_read_listed_files(verify, tmp_path):
    for location, opens in ((DATA, True), ("../../secret", False)):
        folder = write(tmp_path / str(opens), model_of(initializer=[tensor(location)]))
        (folder / names.LAST_LOGITS_GRAPH).write_bytes((folder / GRAPH).read_bytes())
        listed = file_records(folder, [GRAPH, names.LAST_LOGITS_GRAPH, f"onnx/{DATA}"])
        write_json(folder / names.MANIFEST, MANIFEST | {"files": listed})
        with contextlib.nullcontext() if opens else pytest.raises(IntegrityError, match="reads weights from"):
            open_bundle(folder, verify=verify)


def test_the_walk_knows_every_message_of_the_installed_schema_that_may_hold_a_tensor():
    reach = {"TensorProto"}
    messages = {
        name: {part.number: part.message_type.name for part in message.fields if part.message_type is not None}
        for name, message in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.items()
    }
    while grown := {name for name, fields in messages.items() if reach & set(fields.values())} - reach:
        reach |= grown
    assert reach - {"TensorProto"} == set(CHILDREN)
    for name in CHILDREN:
        assert CHILDREN[name] == {number: kind for number, kind in messages[name].items() if kind in reach}


def changed(clear: str = "", location: str = DATA, **more: str) -> onnx.TensorProto:
    """A tensor whose place is told in a way that readers may read otherwise."""
    made = tensor(location)
    if clear:
        made.ClearField(clear)
    for key, value in more.items():
        made.external_data.add(key=key.removesuffix("_"), value=value)
    return made


def merged_of_two() -> bytes:
    """An attribute's tensor in two parts, which protobuf merges: the place in one, other bytes in the other."""
    rest = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    rest.external_data.add(key="length", value="4000")
    parts = onnx.AttributeProto(t=tensor()).SerializeToString() + onnx.AttributeProto(t=rest).SerializeToString()
    assert len(onnx.AttributeProto.FromString(parts).t.external_data) == 4
    return field(7, field(1, field(5, parts)))  # attribute of a node of a graph of a model


def nested(depth: int) -> bytes:
    """Subgraphs in one another, three messages each."""
    content = b""
    for _ in range(depth):
        content = field(1, field(5, field(6, content)))  # g of an attribute of a node of a graph
    return field(7, content)


def cut_field_number() -> bytes:
    """The 7 of graph, with a tag beyond 2**32, which some readers cut to 32 bits."""
    return field(7 + (1 << 29), model_of(initializer=[tensor("../../secret")]).graph.SerializeToString())


NO_TEXT = model_of(initializer=[tensor("???")]).SerializeToString().replace(b"???", b"\xed\xa0\x80")
ELSEWHERE = (MEMORY, "/etc/passwd", "a/../../x", "a\\b", "C:x", ".", "unlisted", "x\0")
# the damage: (a tensor or a whole file, a key word)
REFUSED: dict[str, tuple[onnx.TensorProto | bytes, str]] = {
    **{f"at {location!r}": (tensor(location), "reads weights from") for location in ELSEWHERE},
    "not UTF-8": (NO_TEXT, "not valid text"),
    "one byte too many": (tensor(offset=0, length=65), "bytes 0 to 65 of 'model.onnx_data', which has 64"),
    "behind the end": (tensor(offset=64, length=1), "bytes 64 to 65"),
    "hexadecimal": (tensor(offset="0x10", length=4), "not an ONNX graph"),
    "30 digits": (tensor(offset="1" * 30, length=4), "not an ONNX graph"),
    "no length": (tensor(offset=0, length=""), "not an ONNX graph"),
    "a key twice": (changed(location_="../../secret"), "or says it twice"),
    "a key of one reader": (changed(prepacked_0="x|0;99;y"), "prepacked_0"),
    "no place": (changed("external_data"), "not an ONNX graph"),
    "undeclared": (changed("data_location", "../../secret"), "reads weights from"),
    "long": (tensor("./" * 2100 + DATA), "is told in"),
    "merged of two": (merged_of_two(), "a tensor has '4000' bytes"),
    "a number beyond 32 bits": (cut_field_number(), "impossible number"),
    "empty": (b"", "ends too early"),
    "a graph without its length": (b"\x3a", "not an ONNX graph"),
    "a node that reaches beyond its graph": (b"\x3a\x02\x0a\x05\x12\x03abc", "not an ONNX graph"),
    "a length without end": (b"\x3a" + b"\xff" * 12, "not an ONNX graph"),
    "a group": (b"\x3b\x3c", "not an ONNX graph"),
    "onnxruntime's own format": (b"ORTM" * 4, "not an ONNX graph"),
    "deeper than 100": (nested(34), "nested more than 100"),
    "very deep": (nested(20_000), "nested more than 100"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_graph_that_readers_may_read_otherwise_or_not_at_all_is_refused(spoilt, tmp_path):
    content, word = REFUSED[spoilt]
    model = content if isinstance(content, bytes) else model_of(initializer=[content])
    with pytest.raises(IntegrityError, match=rf"model\.onnx .*{word}"):
        check(write(tmp_path / "b", model))


def test_inline_weights_are_skipped(tmp_path):
    inline = onnx.TensorProto(name="i", data_type=1, dims=[1 << 20], raw_data=b"j\x05../.." * (1 << 19))
    file = tmp_path / "m.onnx"
    file.write_bytes(model_of(initializer=[inline, tensor()]).SerializeToString())
    assert list(external_data(file)) == [ExternalData(DATA, 16, 48)]


# --- against protobuf itself --------------------------------------------------------------------------------------
def locations(message: Any) -> Iterator[tuple[str, ...]]:
    """Every value that protobuf reads under external_data, at any place."""
    for part, value in message.ListFields():
        if part.name == "external_data":
            yield tuple(entry.value for entry in value if entry.key == "location")
        elif part.message_type is not None:
            for inner in value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]:
                yield from locations(inner)


INLINE = model_of(initializer=[helper.make_tensor("i", 1, [2], [1.0, 2.0])])
# A message after another is merged with it.
WHOLE = b"".join(model.SerializeToString() for model in (INLINE, *(hidden(each, tensor()) for each in PLACES[:9])))
# The replacement of so many bytes: other bytes, or a copy of 40 from elsewhere.
changes = st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.binary(max_size=4) | st.integers(0, 255))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(changes, min_size=1, max_size=3))
@example([])
def test_a_damaged_graph_is_refused_or_read_as_protobuf_reads_it(tmp_path_factory, changed):
    file, content = tmp_path_factory.getbasetemp() / "damaged.onnx", bytearray(WHOLE)
    for at, length, new in changed:
        content[at : at + length % 8] = new if isinstance(new, bytes) else content[new : new + 40]
    file.write_bytes(content)
    try:
        found = {data.location for data in external_data(file)}
    except IntegrityError:
        assert changed
        return
    try:
        model = onnx.ModelProto.FromString(file.read_bytes())
    except Exception:  # protobuf refuses more, such as bytes that are not text
        return
    assert {location for said in locations(model) for location in said} <= found


def context(value: str | bytes) -> onnx.NodeProto:
    return helper.make_node("EPContext", [], ["c"], domain="com.microsoft", embed_mode=0, ep_cache_context=value)


@pytest.mark.parametrize("place", ["graph", "subgraph"])
@pytest.mark.parametrize(
    "value", ["/etc/hostname", "../other.bin", "unlisted.bin", "a/../own.bin", "", b"\xff", b"own.bin\0" + b"x" * 5000]
)
def test_a_context_binary_is_a_listed_file_beside_the_graph(tmp_path, value, place):
    def listed(node: onnx.NodeProto) -> Any:
        if place == "subgraph":
            node = helper.make_node("If", ["c"], ["d"], then_branch=helper.make_graph([node], "inner", [], []))
        onnx.save(model_of(node), tmp_path / "model.onnx")
        return parse_records(tmp_path, file_records(tmp_path, ["model.onnx", "own.bin"]))

    (tmp_path / "own.bin").write_bytes(b"compiled")
    check_contexts(tmp_path, listed(context("own.bin")), compiled=True)
    with pytest.raises(IntegrityError, match="reads a compiled graph from"):
        check_contexts(tmp_path, listed(context(value)), compiled=True)
    with pytest.raises(IntegrityError, match="the manifest says that nothing was compiled"):
        check_contexts(tmp_path, listed(context("own.bin")), compiled=False)


# --- heads of a bundle with states --------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [4, 1, 5, 0, -1, 2**40, "four"])
@pytest.mark.parametrize("name", ["kv_num_heads", "q_num_heads"])
def test_other_numbers_of_heads_than_the_states_have_are_refused(name, heads, tmp_path):
    node = helper.make_node("LinearAttention", ["q"], ["o"], domain="com.microsoft", **{name: heads})
    onnx.save(model_of(node), tmp_path / "model.onnx")
    files = {"model.onnx": file_record(tmp_path / "model.onnx"), "other.json": FileRecord(1, "0" * 64)}
    refused = (
        pytest.raises(IntegrityError, match="number of heads") if heads not in (1, 4) else contextlib.nullcontext()
    )
    with refused:
        check_heads(tmp_path, files, 4)
