"""Which implementation runs, and what is said of the others."""

import subprocess
import sys

import pytest
import torch

import qarvd_kernels as ops
from qarvd_kernels import dispatch
from qarvd_kernels.declare import OPERATORS


def test_report_names_every_operator_and_every_other_implementation():
    rows = ops.report("cpu")
    assert tuple(name for name, _, _ in rows) == ops.OPERATORS
    for _, chosen, others in rows:
        assert chosen == "reference"
        assert [backend for backend, _ in others] == ["cuda", "fa3", "triton"]
        assert all(reason for _, reason in others)


def test_a_broken_implementation_gives_way_with_its_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda backend, theme: f"{backend} of {theme} is broken")
    operator = OPERATORS["row_sums"]
    assert (
        dispatch._unsupported_reason("cuda", "row_sums", operator.theme, torch.device("cpu"), None)
        == "cuda of quantize is broken"
    )


def test_refusal_that_raises_is_a_reason(monkeypatch):
    class Module:
        @staticmethod
        def unsupported_reason(*_):
            raise RuntimeError("no driver")

        row_sums = None

    monkeypatch.setattr(dispatch, "_load", lambda *_: Module)
    assert (
        dispatch._unsupported_reason("cuda", "row_sums", "quantize", torch.device("cpu"), None)
        == "RuntimeError: no driver"
    )


def test_environment_variable_forces_one(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    for _, chosen, others in ops.report("cpu"):
        assert chosen == "reference" and {reason for _, reason in others} == {"QARVD_KERNELS=reference"}
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "magic")
    with pytest.raises(ValueError, match="QARVD_KERNELS is 'magic', expected one of cuda, fa3, triton, reference"):
        ops.report("cpu")


def test_kinds_are_remembered():
    operator = OPERATORS["row_sums"]
    operator.forget()
    for _ in range(3):
        ops.row_sums(torch.zeros(4, 8, dtype=torch.int8), 2)
    assert len(operator._functions) == 1
    ops.row_sums(torch.zeros(5, 8, dtype=torch.int8), 2)
    assert len(operator._functions) == 2


def test_strides_reach_implementations_that_take_them(monkeypatch):
    """Others are handed contiguous copies; the same shapes with other strides are another kind of call."""
    seen = []

    def implementation(a, num_outliers):
        seen.append(a.is_contiguous())
        return a.sum(1).to(torch.int32)[:, None].expand(-1, 2)

    operator = OPERATORS["row_sums"]
    operator.forget()
    strided = torch.zeros(8, 4, dtype=torch.int8).t()
    for function in (implementation, dispatch.takes_strides(lambda *args: implementation(*args))):
        monkeypatch.setattr(operator, "choose", lambda args, f=function: dispatch.Choice("triton", f, ()))
        operator.run(strided.contiguous(), 2), operator.run(strided, 2)
        operator.forget()
    assert seen == [True, True, True, False]


def test_import_touches_neither_cuda_nor_triton():
    code = (
        "import sys, torch, qarvd_kernels; "
        "print(torch.cuda.is_initialized(), 'qarvd_kernels.triton.gemm' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
