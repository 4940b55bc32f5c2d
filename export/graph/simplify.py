"""Folds and rewrites torch's graph exactly.

torch's own last step runs onnxscript's optimizer with all of its default rules. One of them treats x + 1e-8 as x + 0: a
norm with such an epsilon then divides by zero on a row of zeros. So `trace` skips that step, and this module runs the
same passes with only the rules that change no number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from .edit import add_weight, replace_uses, shape_of, weight


def _only_at(op_type: str, rule: Any) -> Any:
    """Returns the rule, tried only at these nodes: one with two outputs walks the whole graph for each node."""
    tried = copy.copy(rule)
    tried.try_rewrite = lambda model, graph, node, **options: (
        rule.try_rewrite(model, graph, node, **options) if node.op_type == op_type else None
    )
    return tried


_RULES = [
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,  # before reshape_reshape_rule, which handles its output
    rules.reshape_reshape_rule,
    _only_at("Slice", rules.slice_split_rule),
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
]
_ROUNDS = 2  # folding makes constants that rules need; rules make nodes that fold


def simplify(model: ir.Model, kept: Callable[[ir.Node], bool] = lambda node: False) -> None:
    """Changes the model in place. It computes the same numbers with fewer nodes. Nodes that are `kept` do not fold."""
    ir.passes.Sequential(common.InlinePass())(model)
    _split_stacked_weights(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, should_fold=lambda node: False if kept(node) else None)
        ir.passes.Sequential(
            RewritePass(_RULES),
            common.IdentityEliminationPass(),  # such as two transposes that cancel: rules do not look past an Identity
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # onnx_ir leaves it untyped
            common.RemoveUnusedOpsetsPass(),
        )(model)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _split_stacked_weights(model: ir.Model) -> None:
    """Makes a weight of each matrix of a stack, such as experts, that is only read one by one at constant places.

    Constants are folded up to a size only, and a product of a matrix that a node gathers is not quantized.
    """
    for stack in tuple(model.graph.initializers.values()):
        nodes = [node for node, _ in stack.uses()]
        if stack.dtype != ir.DataType.FLOAT or not nodes or len(shape_of(stack) or ()) < 3:
            continue
        places = [_place(node) for node in nodes]
        if None in places or (content := weight(stack)) is None:
            continue
        parts = {place: add_weight(model, f"{stack.name}.{place}", content[place]) for place in places}
        for node, place in zip(nodes, places, strict=True):
            replace_uses(node.outputs[0], parts[place])


def _place(node: ir.Node) -> int | None:
    """The constant place at which a node reads a part of its first input's first axis, None for other nodes."""
    index = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "Gather" and node.inputs[1] else None
    if index is None or index.shape.rank() or node.attributes.get_int("axis", 0) or node.outputs[0].is_graph_output():
        return None
    return int(index.numpy())
