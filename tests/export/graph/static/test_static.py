"""Static graphs: every size a number, masks as inputs, new rows as outputs, and the same numbers."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import StaticShape, open_bundle
from pastkey.errors import ContractError
from pastkey.export import export
from pastkey.export.graph.static.static import make_static
from pastkey.export.graph.write.weights_file import WeightsFile

from ....shared import divided
from ...cases import CASES
from ...small_graphs import model_of


def exported_static(module, out, context):
    """`verify` has run prefill, decode and chunks by these graphs, and compared them with the module."""
    report = export(module, out, precision="fp32", graph="static", chunk=7, context_length=context)
    parity = report.manifest.parity["fp32"]
    assert (parity["ok"], parity["reference"], report.manifest.graph) == (True, "source", "static")
    assert set(parity["checks"]) == {"prefill", "decode", "chunks_of_7", "chunks_of_64", "greedy"}
    return report.manifest.static


QUICK, IN_CI = ("softcap_bias_and_scale",), ("transformer_encoder", "gpt_j")


@pytest.mark.parametrize("name", divided([*QUICK, *IN_CI, "nano_gpt"], quick=QUICK, ci=IN_CI))
def test_a_decoder_computes_the_same_by_static_graphs(name, tmp_path):
    """tests/conformance has the paths through them."""
    case = CASES[name]
    assert exported_static(case.build(), tmp_path / "b", case.context) == StaticShape(7, -1e4, (0,))
    bundle = open_bundle(tmp_path / "b")
    for path, tokens in zip(bundle.static_graphs, (1, 7), strict=True):
        require_fixed(path, bundle, tokens)


def require_fixed(path, bundle, tokens):
    """Sizes are numbers, ids int32, and weights where those of the common graph are."""
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path))
    context = bundle.manifest.context_length
    for value in [*model.graph.input, *model.graph.output]:
        assert all(size.HasField("dim_value") for size in value.type.tensor_type.shape.dim), value.name
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert names.ATTENTION_MASK not in sizes
    assert sizes[names.static_mask(0)] == [1, 1, tokens, context + tokens]
    assert sizes[names.INPUT_IDS] == [1, tokens]
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    assert kinds[names.INPUT_IDS] == kinds[names.POSITION_IDS] == onnx.TensorProto.INT32
    assert not {"Shape", "Range", "Greater", "And", "Cos", "Sin"} & {node.op_type for node in model.graph.node}
    files = {entry.value for w in model.graph.initializer for entry in w.external_data if entry.key == "location"}
    assert files <= {names.weights_file(bundle.all_logits_graph.name), Path(names.STATIC_DATA).name}


def test_both_graphs_share_cosines_and_sines_of_half_a_heads_numbers_for_each_position(exported):
    bundle = exported("llama", "fp32", "static").bundle
    (size,) = {layer.key_head_size for layer in bundle.manifest.layers}
    assert (bundle.path / names.STATIC_DATA).stat().st_size == bundle.manifest.context_length * size * 4


FAMILIES = {
    "gemma2": (0, 12),
    "mistral": (12,),
    "bloom": "needs more than masks",
    "lfm2": "it keeps rows of short convolutions",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", divided(FAMILIES, ci=["gemma2", "bloom"]))
def test_windows_are_masks_of_their_own_and_what_masks_cannot_tell_is_refused(family, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from ...families import CONTEXT, build

    known = FAMILIES[family]
    if isinstance(known, tuple):
        assert exported_static(build(family), tmp_path / "b", CONTEXT).windows == known
        return
    with pytest.raises(ContractError, match=str(known)):
        exported_static(build(family), tmp_path / "b", CONTEXT)
    assert not [*tmp_path.iterdir()]


def standard(body):
    """A graph of an attention's scores and nothing else."""
    model = model_of(
        "g (int64[batch_size,sequence_length] input_ids, int64[batch_size,total_sequence_length] attention_mask, "
        "float[batch_size,1,sequence_length,total_sequence_length] scores) => "
        "(float[batch_size,1,sequence_length,total_sequence_length] logits) "
        f"{{ zero = Constant <value_int = 0> () low = Constant <value_float = -3e38> () {body} }}"
    )
    for value in model.graph.inputs:
        value.type = value.type or ir.TensorType(ir.DataType.INT64)
    return model


SEEN = "some = Greater(attention_mask, zero) axes = Constant <value_ints = [1, 2]> () seen = Unsqueeze(some, axes) "


@pytest.mark.parametrize(
    "body",
    [
        SEEN + "logits = Where(seen, scores, low)",  # later tokens of a run, too
        SEEN + "other = Constant <value_float = 1.0> () logits = Where(seen, scores, other)",
        SEEN + "number = Cast <to = 1> (seen) logits = Mul(scores, number)",
    ],
    ids=["not_causal", "no_lowest_score", "arithmetic"],
)
def test_a_condition_that_is_no_mask_of_earlier_tokens_is_refused(body, tmp_path):
    with pytest.raises(ContractError, match="needs more than masks"):
        make_static(standard(body), 2, 5, WeightsFile(tmp_path / "data"))
