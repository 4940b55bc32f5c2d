"""Computes the parts of an exported program that depend only on constants.

torch.onnx does not know every operator that may be there, such as erfinv of a number.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

_MOST_NUMBERS: Final = 1 << 16  # of a constant: a larger one is computed by its graph
_HARMLESS: Final = "aten::detach_"  # the only operator in place that changes no number


def fold_constants(program: ExportedProgram) -> bool:
    """Replaces, in place, each value that depends only on constants and buffers. Returns whether there were some."""
    known = _constants(program)
    given = {*known}
    for node in program.graph.nodes:
        if node.op != "call_function" or known.keys().isdisjoint(node.all_input_nodes):
            continue
        if isinstance(node.target, OpOverload):
            if not known.keys().isdisjoint(_written(node)):
                return False  # a constant may change
        elif node.target is not operator.getitem:
            continue
        if known.keys() >= {*node.all_input_nodes}:
            found = node.target(*map_arg(node.args, known.get), **map_arg(node.kwargs, known.get))
            if all(isinstance(part, Tensor) and part.numel() <= _MOST_NUMBERS for part in tree_leaves(found)):
                known[node] = found
    folded = [
        (node, value)
        for node, value in known.items()
        if node not in given and isinstance(value, Tensor) and not known.keys() >= {*node.users}
    ]
    for node, value in folded:
        _replace(program, node, value, {*known})
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return bool(folded)


def _written(node: Node) -> list[Any]:
    """Returns the arguments that an operator in place changes."""
    schema = node.target._schema  # type: ignore[union-attr]
    if schema.name == _HARMLESS:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    return [given for wanted, given in pairs if wanted.alias_info is not None and wanted.alias_info.is_write]


def _constants(program: ExportedProgram) -> dict[Node, Any]:
    """Returns the constants and buffers that are not too large, by their placeholders."""
    kinds = (InputKind.CONSTANT_TENSOR, InputKind.BUFFER)
    held = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    values = {spec.arg.name: held.get(spec.target or "") for spec in specs if spec.kind in kinds}
    return {
        node: value
        for node in program.graph.nodes
        if node.op == "placeholder"
        and isinstance(value := values.get(node.name), Tensor)
        and value.numel() <= _MOST_NUMBERS
    }


def _replace(program: ExportedProgram, node: Node, value: Tensor, known: set[Node]) -> None:
    """Gives the users of a node that are not `known` a constant in its place."""
    specs = program.graph_signature.input_specs
    first = next(i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    before = next(found for found in program.graph.nodes if found.name == specs[first].arg.name)
    with program.graph.inserting_before(before):
        constant = program.graph.placeholder(f"folded_{node.name}")
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant, lambda user: user not in known)
    specs.insert(first, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=constant.name), constant.name))
    program.constants[constant.name] = value.detach().clone()
