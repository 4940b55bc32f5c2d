"""Finds the tensors of an ONNX graph whose data is outside the graph's own file.

The graph's author chooses their paths, and onnxruntime below 1.24.2 reads them wherever they lead. So a graph is walked
here before onnxruntime opens it: over protobuf's wire format, since the runtime does not depend on onnx. Everything
that cannot hold a tensor is skipped, including the bytes of inline weights.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from ..errors import IntegrityError
from ..values import shown
from .folder import FileRecord, is_inside
from .protobuf import BYTES, VARINT, DamagedError, fields, varint

# The messages of onnx.proto that can contain a TensorProto: field number -> message of that field.
CHILDREN: Final[Mapping[str, Mapping[int, str]]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a TensorProto
_KEYS = frozenset({"location", "offset", "length", "checksum"})  # of external data
_KEY, _VALUE = 1, 2  # of a StringStringEntryProto
_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT = 1, 4  # of an AttributeProto
_ATTRIBUTE_INT = 3
_HEADS = (b"q_num_heads", b"kv_num_heads")
_CONTEXT = b"ep_cache_context"  # the attribute of an EPContext node
_DEEPEST = 100  # nested messages; protobuf's own limit
_LONGEST = 4096  # bytes of a path, or of a key with its value


class ExternalData(NamedTuple):
    """The data of one tensor outside the graph's file."""

    location: str  # the file, as the graph names it: relative to the graph's folder
    offset: int  # bytes
    length: int  # bytes


def check_external_data(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raises IntegrityError if a graph of `files`, a manifest's list, reads data from anywhere but a listed file.

    A location must be a plain path below the graph's own folder, and its bytes must be within that file.
    """
    for name in files:
        if not name.endswith(".onnx"):
            continue
        listed: dict[str, FileRecord | None] = {}  # by location
        for data in external_data(folder / name):
            if data.location not in listed:
                place = (PurePosixPath(name).parent / data.location).as_posix()
                listed[data.location] = files.get(place) if is_inside(data.location) else None
            file = listed[data.location]
            if file is None:
                raise IntegrityError(
                    f"{folder / name} reads weights from {shown(data.location)}, which is not a file next to it that "
                    "the manifest lists: the bundle was altered, copy it again"
                )
            if data.offset + data.length > file.size:
                raise IntegrityError(
                    f"{folder / name} reads the bytes {data.offset} to {data.offset + data.length} of "
                    f"{shown(data.location)}, which has {file.size}: the bundle was altered, copy it again"
                )


def external_data(graph: Path) -> Iterator[ExternalData]:
    """Yields the external data of every tensor of an ONNX file, at any depth.

    Raises IntegrityError if the file is not an ONNX graph. An external tensor must have a location, and each key once:
    protobuf merges repeated keys, and readers disagree about them.
    """
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for kind, start, end in messages(content):
                if kind == "TensorProto" and (data := tensor_data(content, start, end)) is not None:
                    yield data
    except (DamagedError, IndexError, ValueError) as error:  # IndexError: past the end; ValueError: an empty file
        reason = str(error) if isinstance(error, DamagedError) else "it ends too early"
        raise IntegrityError(f"{graph} is not an ONNX graph ({reason}): it was cut short or altered") from None


def check_contexts(folder: Path, files: Mapping[str, FileRecord], *, compiled: bool) -> None:
    """Raises IntegrityError if a graph reads a context binary from anywhere but a listed file next to it.

    An EPContext node names an execution provider's compiled binary, and OpenVINO reads it wherever its path leads. Only
    a compiled bundle has such nodes.
    """
    for name in files:
        path = folder / name
        if path.suffix not in (".onnx", ".ort") or not files[name].size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_CONTEXT) < 0:
                continue
            if not compiled or path.suffix == ".ort":
                raise IntegrityError(
                    f"{path} has a node that an execution provider compiled, and the manifest says that nothing was "
                    "compiled: the bundle was altered, copy it again"
                )
            for kind, start, end in messages(content):
                found = _context(content, start, end) if kind == "AttributeProto" else None
                if found is None:
                    continue
                if not is_inside(found) or (PurePosixPath(name).parent / found).as_posix() not in files:
                    raise IntegrityError(
                        f"{path} reads a compiled graph from {shown(found)}, which is not a file next to it that the "
                        "manifest lists: the bundle was altered, copy it again"
                    )


def check_heads(folder: Path, files: Mapping[str, FileRecord], most: int) -> None:
    """Raises IntegrityError if a node has fewer than one or more than `most` heads of keys or of queries.

    onnxruntime below 1.31 divides by the width of a head of LinearAttention, and ends the process where that is 0.
    """
    for name in files:
        if not name.endswith(".onnx"):
            continue
        with (folder / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for kind, start, end in messages(content):
                if kind != "AttributeProto":
                    continue
                parts = {number: (a, b) for number, _, a, b in fields(content, start, end)}
                (a, b), (number, _) = parts.get(_ATTRIBUTE_NAME, (0, 0)), parts.get(_ATTRIBUTE_INT, (0, 0))
                if content[a:b] in _HEADS and not (number and 1 <= varint(content, number)[0] <= most):
                    raise IntegrityError(
                        f"{folder / name} has a node with another number of heads than the {most} of the manifest: the "
                        "bundle was altered, copy it again"
                    )


def _context(content: mmap.mmap, start: int, end: int) -> str | None:
    """Returns the path in an EPContext node's attribute; None for another attribute.

    A binary inside the graph is refused as well: behind a NUL it may begin with a path that a provider opens.
    """
    parts = {number: (a, b) for number, wire, a, b in fields(content, start, end) if wire == BYTES}
    (a, b), (first, last) = parts.get(_ATTRIBUTE_NAME, (0, 0)), parts.get(_ATTRIBUTE_TEXT, (0, 0))
    return content[first : min(last, first + _LONGEST)].decode("utf-8", "replace") if content[a:b] == _CONTEXT else None


def messages(content: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """Yields the kind and place of each message of CHILDREN, once and depth first, so that few are open at a time."""
    open_messages = [(CHILDREN["ModelProto"], fields(content, 0, len(content)))]
    while open_messages:
        children, within = open_messages[-1]
        for number, wire, start, end in within:
            child = children.get(number) if wire == BYTES else None
            if child is None:
                continue
            yield child, start, end
            if child in CHILDREN:
                open_messages.append((CHILDREN[child], fields(content, start, end)))
                break
        else:
            open_messages.pop()
        if len(open_messages) > _DEEPEST:
            raise DamagedError(f"it is nested more than {_DEEPEST} messages deep")


def tensor_data(content: mmap.mmap, position: int, end: int) -> ExternalData | None:
    """Returns a TensorProto's external data; None if it is inline. Raises DamagedError, or IndexError past the end."""
    external, said = False, dict[str, str]()
    for number, wire, start, after in fields(content, position, end):
        if number == _DATA_LOCATION and wire == VARINT:
            external |= varint(content, start)[0] != 0
        elif number == _EXTERNAL_DATA and wire == BYTES:
            if after - start > _LONGEST:
                raise DamagedError(f"a tensor's place is told in {after - start} bytes")
            key, value = _pair(content[start:after])
            if key not in _KEYS or key in said:
                raise DamagedError(f"a tensor says {shown(key)} of its data, or says it twice")
            said[key] = value
    if not external and not said:
        return None
    location, offset, length = (said.get(key, "") for key in ("location", "offset", "length"))
    if not location or not all(n.isdecimal() and n.isascii() and len(n) < 19 for n in (offset, length)):
        raise DamagedError(f"a tensor has {shown(length)} bytes from {shown(offset)} on in the file {shown(location)}")
    return ExternalData(location, int(offset), int(length))


@functools.lru_cache  # most tensors of a graph name the same file
def _pair(entry: bytes) -> tuple[str, str]:
    """Returns the key and value of a StringStringEntryProto."""
    parts = {number: entry[a:b] for number, wire, a, b in fields(entry, 0, len(entry)) if wire == BYTES}
    try:
        return parts.get(_KEY, b"").decode(), parts.get(_VALUE, b"").decode()
    except UnicodeDecodeError:
        raise DamagedError("a tensor's location is not valid text") from None
