"""RMS norm and SiLU after cached frames, against float64."""

import pytest
import torch
from kernel_inputs import generator

import qarvd_kernels as ops


def reference(x, bias, weight, past, lead):
    x, zeros = (
        x.double() + (0 if bias is None else bias.double()),
        torch.zeros(x.shape[0], lead, *x.shape[2:], dtype=torch.float64),
    )
    if past is not None:
        zeros[:, lead - past.shape[1] :] = past.double()
    normed = x * (x.shape[3] / x.square().sum(-1, keepdim=True).clamp_min(1e-24)).sqrt() * weight.double()
    return torch.cat([zeros, normed * normed.sigmoid()], dim=1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("remembered", "lead"), [(0, 0), (0, 2), (1, 2), (2, 2)])
@pytest.mark.parametrize("biased", (True, False))
def test_rms_norm_silu(dtype, remembered, lead, biased):
    g = generator()
    bias = torch.randn(24, generator=g).to(dtype) if biased else None
    x, weight = torch.randn(2, 3, 5, 24, generator=g).mul(3).to(dtype), torch.randn(24, generator=g).to(dtype)
    x[0, 1, 2] = 0
    past = torch.randn(2, remembered, 5, 24, generator=g).to(dtype) if remembered else None
    got = ops.rms_norm_silu(x, bias, weight, past, lead)
    assert got.dtype == dtype
    tolerance = {"rtol": 8e-3, "atol": 4e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.double(), reference(x, bias, weight, past, lead), **tolerance)


def test_opcheck():
    x, weight = torch.randn(1, 3, 5, 8), torch.randn(8)
    for past in (None, torch.randn(1, 2, 5, 8)):
        torch.library.opcheck(ops.rms_norm_silu.overload, (x, weight, weight, past, 2))
    torch.library.opcheck(ops.add_bias.overload, (torch.randn(5, 8), torch.randn(5, 8), weight))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_add_bias(dtype):
    total, x, bias = (torch.randn(*shape, generator=generator(2)).to(dtype) for shape in ((7, 24), (7, 24), (24,)))
    want = total.double() + x.double() + bias.double()
    ops.add_bias(total, x, bias)
    tolerance = {"rtol": 8e-3, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(total.double(), want, **tolerance)


def test_on_meta_only_the_result_is_made():
    with torch.no_grad(), torch.device("meta"):
        assert ops.rms_norm_silu(torch.empty(1, 3, 5, 8), None, torch.empty(8), None, 2).shape == (1, 5, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(3, 5, 8), None, torch.randn(8), None, 0), "x is .* expected float"),
        ((torch.randn(1, 3, 5, 8), None, torch.randn(7), None, 0), "shape of weight"),
        ((torch.randn(1, 3, 5, 8), None, torch.randn(8), torch.randn(1, 2, 4, 8), 2), "shape of past"),
        (
            (torch.randn(1, 3, 5, 8), torch.randn(8), torch.randn(8), torch.randn(1, 2, 5, 8), 1),
            "lead is 1, expected at least the 2",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm_silu(*arguments)
