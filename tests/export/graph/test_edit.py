import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.graph import edit
from pastkey.export.graph.part import Subgraph, constant, depends_only_on
from pastkey.export.graph.simplify import simplify

from ..small_graphs import model_of, run_model


@pytest.fixture
def model():
    """y = Neg(a), z = Abs(a), where a = Relu(x)."""
    return model_of("g (float[3] x) => (float[3] y, float[3] z) { a = Relu(x) y = Neg(a) z = Abs(a) }")


def operators(model):
    return [node.op_type for node in model.graph]


def test_a_weight_is_the_array_itself_and_goes_where_nothing_reads_it(model):
    array, (relu, neg, _) = np.ones(3, np.float32), model.graph
    used, _ = edit.add_weight(model, "used", array), edit.add_weight(model, "unused", np.ones(3))
    assert edit.weight(used) is array
    assert edit.weight(model.graph.inputs[0]) is edit.weight(relu.outputs[0]) is edit.weight(None) is None
    neg.replace_input_with(0, used)
    edit.drop_unused_weights(model)
    assert set(model.graph.initializers) == {"used"}


def test_an_output_that_is_replaced_keeps_name_type_and_place(model):
    _, neg, _ = model.graph
    sqrt = ir.node("Sqrt", [neg.inputs[0]])
    edit.replace_node(model, neg, sqrt)
    assert operators(model) == ["Relu", "Sqrt", "Abs"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0] is sqrt.outputs[0]
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_several_nodes_stand_in_for_one_and_every_reader_follows(model):
    relu, neg, absolute = model.graph
    builder = edit.NodeBuilder(model, "clipped")
    low = builder.add("Max", relu.inputs[0], builder.constant("zero", np.zeros(1, np.float32)))
    builder.add("Min", low, builder.constant("six", np.full(1, 6, np.float32)))
    edit.replace_node(model, relu, *builder.nodes)
    assert operators(model) == ["Max", "Min", "Neg", "Abs"]
    assert {edit.input_of(node.inputs[0], "Min") for node in (neg, absolute)} == {low}
    assert {"clipped.zero", "clipped.six"} == set(model.graph.initializers)
    names = [output.name for node in model.graph for output in node.outputs]
    assert len(set(names)) == len(names)


# --- nodes of one input only are found, cut out and run ---------------------------------------------------------------
TEXT = (
    "g (int64[1,3] position_ids, float[1,3] x, float[1,3] w) => (float[1,3] logits) { "
    "p = Cast <to = 1> (position_ids) v = Neg(w) q = Mul(p, v) s = Sin(q) y = Mul(s, x) logits = Neg(y) }"
)
W = np.array([[1, 2, 3]], np.float32)


def test_the_values_of_one_input_and_constants_are_found():
    model = model_of(TEXT, w=W)
    source = model.graph.inputs[0]
    inside = depends_only_on(model, [source])
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert {name for name, value in values.items() if id(value) in inside} == {"p", "q", "s"}
    assert [name for name, value in values.items() if constant(value)] == ["v"]


def test_a_part_gives_what_the_graph_computes_and_leaves_it_alone():
    model = model_of(TEXT, w=W)
    sine = next(node.outputs[0] for node in model.graph if node.op_type == "Sin")
    part = Subgraph(model, sine, model.graph.inputs[0])
    np.testing.assert_allclose(part.run(np.array([[4, 5, 6]])), np.sin(-W * [4, 5, 6]), atol=1e-6)
    assert operators(model) == ["Cast", "Neg", "Mul", "Sin", "Mul", "Neg"]


# --- `simplify` changes no number -------------------------------------------------------------------------------------
X = np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)


TRANSPOSE = "Transpose <perm = [1, 0]>"


def of(number):
    return np.full(4, number, np.float32)


SIMPLER = {  # the body, its weights, and the operators that are left
    # A norm divides by the root of epsilon on a row of zeros, and by zero without.
    "an epsilon of 1e-8 is not zero": ("a = Add(x, e) y = Sqrt(a)", {"e": of(1e-8)}, ["Add", "Sqrt"]),
    "transpositions undo each other": (f"a = {TRANSPOSE} (x) b = {TRANSPOSE} (a) y = Neg(b)", {}, ["Neg"]),
    "constants are folded": ("p = Mul(two, three) y = Add(x, p)", {"two": of(2), "three": of(3)}, ["Add"]),
    "a matrix of a stack is a weight of its own": (
        "i = Constant <value_int = 1> () m = Gather (stack, i) p = MatMul(x, m) q = MatMul(p, u) y = Add(q, x)",
        {"stack": np.random.default_rng(0).random((2, 4, 9000), np.float32), "u": np.ones((9000, 4), np.float32)},
        ["MatMul", "MatMul", "Add"],
    ),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_simplify_changes_no_number(name):
    body, weights, left = SIMPLER[name]
    declared = "".join(f", float[4] {weight}" for weight in weights)
    model = model_of(f"g (float[2,4] x{declared}) => (float[2,4] y) {{ {body} }}", **weights)
    (before,) = run_model(model, x=X)
    simplify(model)
    np.testing.assert_array_equal(run_model(model, x=X)[0], before)
    assert operators(model) == left
