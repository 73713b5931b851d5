"""Operators as torch sees them: schemas inferred from annotations, groups of arguments passed field by field."""

import inspect
import re

import pytest
import torch
from kernel_inputs import quantizer

import qarvd_kernels as ops

# What compiled and exported programs refer to; `(!)` marks an argument that is written to.
TEXT = """
qk_norm_rope_append(Tensor qkv, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin, Tensor(!)
    key_cache, Tensor(!) value_cache, Tensor? query_scale, Tensor? key_scale, Tensor? value_scale, SymInt start) ->
    Tensor
attention_int8(Tensor query, Tensor key, Tensor value, Tensor key_scale, Tensor value_scale, SymInt length) ->
    Tensor
attention_fp8(Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, Tensor value_scale,
    SymInt length) -> Tensor
rms_norm_silu(Tensor x, Tensor? bias, Tensor weight, Tensor? past, SymInt lead) -> Tensor
add_bias(Tensor(!) total, Tensor x, Tensor bias) -> ()
dual_scale_gemm(Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor?
    row_sums, Tensor? row_sum_scale, Tensor? row_scale, ScalarType out_dtype) -> Tensor
dual_scale_gemm_out(Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor?
    row_sums, Tensor? row_sum_scale, Tensor? row_scale, Tensor(!) out) -> ()
dual_scale_gemm_gelu(Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias, Tensor?
    row_sums, Tensor? row_sum_scale, Tensor? row_scale, Tensor out_scale, Tensor out_zero_point, SymInt
    out_outliers) -> Tensor
dual_scale_gemm_residual(Tensor a, Tensor weight, SymInt num_outliers, Tensor ratio, Tensor scale, Tensor bias,
    Tensor? row_sums, Tensor? row_sum_scale, Tensor? row_scale, Tensor residual, Tensor? gate) -> Tensor
expand_int4(Tensor weight_packed, Tensor weight_zero_point, SymInt num_outliers, Tensor(!) out) -> ()
unpack_weight(Tensor weight_packed, int bits) -> Tensor
dual_scale_linear_static(Tensor a, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor
    input_scale, Tensor input_zero_point, Tensor? bias, int bits, SymInt num_outliers, ScalarType out_dtype) ->
    Tensor
dual_scale_linear_dynamic(Tensor a, Tensor a_scale, Tensor weight_packed, Tensor weight_scale, Tensor
    weight_zero_point, Tensor? bias, int bits, SymInt num_outliers, ScalarType out_dtype) -> Tensor
dequantize_weight(Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor channel_order, int
    bits, SymInt num_outliers, ScalarType out_dtype) -> Tensor
weight_only_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor weight_zero_point, Tensor
    channel_order, Tensor? bias, int bits, SymInt num_outliers) -> Tensor
norm_quantize(Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, float eps, Tensor
    channel_order, SymInt num_outliers, Tensor input_scale, Tensor input_zero_point) -> Tensor
add_norm_quantize(Tensor x, Tensor y, Tensor? gate, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor?
    shift, float eps, Tensor channel_order, SymInt num_outliers, Tensor input_scale, Tensor input_zero_point) ->
    (Tensor, Tensor)
add_norm_quantize_(Tensor(!) x, Tensor y, Tensor? gate, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor?
    shift, float eps, Tensor channel_order, SymInt num_outliers, Tensor input_scale, Tensor input_zero_point) -> Tensor
norm_quantize_rows(Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? shift, float eps, Tensor
    channel_scale, int rotation) -> (Tensor, Tensor)
add_norm_quantize_rows_(Tensor(!) x, Tensor y, Tensor? gate, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor?
    shift, float eps, Tensor channel_scale, int rotation) -> (Tensor, Tensor)
add_gated(Tensor x, Tensor y, Tensor? gate) -> Tensor
add_gated_(Tensor(!) x, Tensor y, Tensor? gate) -> ()
quantize_static(Tensor x, Tensor channel_order, SymInt num_outliers, Tensor input_scale, Tensor input_zero_point)
    -> Tensor
quantize_dynamic(Tensor x, Tensor channel_order, SymInt num_outliers) -> (Tensor, Tensor)
quantize_rows(Tensor x, Tensor channel_scale, int rotation) -> (Tensor, Tensor)
row_sums(Tensor a, SymInt num_outliers) -> Tensor
"""
SCHEMAS = re.sub(r"\n +", " ", TEXT).strip().splitlines()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_schemas_stay_what_programs_refer_to(schema):
    name = schema.partition("(")[0]
    inferred = str(getattr(ops, name).overload._schema)
    assert re.sub(r"\(a\d+!\)", "(!)", inferred) == f"qarvd::{schema}"
    arguments = re.findall(r"(\w+)[,)]", schema.rpartition(" -> ")[0])
    assert list(inspect.signature(getattr(ops, name)).parameters) == arguments


def test_every_operator_has_a_schema_here():
    assert tuple(schema.partition("(")[0] for schema in SCHEMAS) == ops.OPERATORS


def test_groups_are_passed_field_by_field():
    """By position or by name, with and without tracing."""
    x = torch.randn(5, 8)
    named = dict(
        zip(("channel_order", "num_outliers", "input_scale", "input_zero_point"), quantizer(8, 3), strict=True)
    )
    want = ops.quantize_static(x, *named.values())
    assert torch.equal(ops.quantize_static(x, **named), want)
    assert torch.equal(ops.quantize_static(x=x, **named), want)
    on_meta = ops.quantize_static(x.to("meta"), *named.values())
    assert (on_meta.shape, on_meta.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("surplus", (-1, 1))
def test_a_wrong_number_of_arguments_is_refused(surplus):
    arguments = [torch.randn(5, 8), *quantizer(8, 3), None][: 5 + surplus]
    with torch.no_grad(), pytest.raises(TypeError, match="argument"):
        ops.quantize_static(*arguments)
