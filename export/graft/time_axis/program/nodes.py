"""Flattens a trace into one list of nodes, with nested graphs inlined, and with the arguments of each node."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...attention import is_users


@dataclass(frozen=True)
class Traced:
    """A node of one trace, from its main graph or a nested one."""

    node: fx.Node
    kind: str  # "call", "ids", "weight" or "constant"
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    constant: Tensor | None = None
    name: str = ""  # the same in a trace at another length
    back: fx.Node | None = None  # of `loops.token_before`: the value of the token before

    @property
    def value(self) -> Any:
        """The fake tensor of the trace, or several."""
        return self.node.meta.get("val")

    @property
    def where(self) -> str:
        """file:line of the innermost frame of user code that made it."""
        for line in reversed((self.node.meta.get("stack_trace") or "").splitlines()):
            if line.strip().startswith('File "'):
                file, number = line.strip()[6:].split('", line ')
                if is_users(Path(file)):
                    return f"{Path(file).name}:{number.split(',')[0]}"
        return "torch"

    @property
    def owner(self) -> str:
        """The class of the submodule."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][1]) if stack else ""


def flat(program: torch.export.ExportedProgram) -> Iterator[Traced]:
    """All nodes, with nested graphs (autocast, no_grad) inlined."""
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        if node.name in places:
            path = places[node.name]
            tensor = program.state_dict[path] if path in program.state_dict else program.constants[path]
            yield Traced(node, "weight", path, constant=tensor, name=node.name)
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            tensor = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            yield Traced(node, "constant", "constant", constant=tensor, name=node.name)
        else:
            yield Traced(node, "ids", "ids")
    yield from _calls(program.graph_module, {})


def _calls(module: fx.GraphModule, known: dict[fx.Node, Any]) -> Iterator[Traced]:
    """The calls of a graph; `known` maps the placeholders of a nested graph to its arguments."""

    def resolved(args: Any, scope: dict[fx.Node, Any] = known) -> Any:
        return fx.node.map_arg(args, lambda node: scope.get(node, node))

    for node in module.graph.nodes:
        if node.op != "call_function" or "assert" in str(node.target) or "sym_constrain" in str(node.target):
            continue
        inner = [getattr(module, str(a.target)) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if inner and isinstance(inner[0], fx.GraphModule):
            given = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
            names = inner[0].graph.find_nodes(op="placeholder")
            scope = dict(zip(names, resolved(given), strict=True))
            yield from _calls(inner[0], scope)
            outputs = resolved(inner[0].graph.output_node().args[0], scope)
            for user in list(node.users):
                if user.target is operator.getitem:
                    known[user] = outputs[user.args[1]]
            if not isinstance(outputs, list | tuple):
                known[node] = outputs
        elif node not in known:
            yield Traced(node, "call", node.target, resolved(node.args), resolved(dict(node.kwargs)))


def forms(nodes: Sequence[Traced]) -> list[tuple[Any, str]]:
    """The targets and kinds, which are equal in two traces of the same code."""
    return [(traced.target, traced.kind) for traced in nodes]


def folded(nodes: Sequence[Traced]) -> list[Traced]:
    """Folds values that depend on no tokens or parameters into constants, e.g. a mask from a loop over positions."""
    known: dict[fx.Node, Any] = {}
    read: set[fx.Node] = set()
    for traced in nodes:
        inputs: list[fx.Node] = []
        fx.node.map_arg((traced.args, traced.kwargs), inputs.append)
        if traced.kind == "constant" or (traced.kind == "weight" and not isinstance(traced.constant, nn.Parameter)):
            known[traced.node] = traced.constant
        elif traced.kind == "call" and all(node in known for node in inputs):
            args, kwargs = fx.node.map_arg((traced.args, traced.kwargs), known.__getitem__)
            known[traced.node] = traced.target(*args, **kwargs)
        else:
            read.update(inputs)
    kept: list[Traced] = []
    for traced in nodes:
        if traced.kind == "weight" or traced.node not in known:
            kept.append(traced)
        elif traced.node in read:
            constant = known[traced.node]
            kept.append(Traced(traced.node, "constant", "constant", constant=constant, name=f"table {len(kept)}"))
    return kept
