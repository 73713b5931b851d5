"""Every Triton kernel, compiled without a GPU: the expected matrix instruction, and no spilled register."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qarvd_kernels import KEY_TILE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install -e '.[test]' on Linux, x86-64"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing: unset TRITON_INTERPRET"
    ),
]
FLOAT, INT, CODES, HALF = "*fp32", "*i32", "*i8", "*bf16"
N, K, OUTLIERS, HEADS = 1536, 8960, 128, 12


def compiled(kernel, signature, constants, capability, options):
    """A kernel with aligned pointers; parameters that the signature leaves out are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {**{name: None for name in names if name not in signature}, **constants}
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    warps, stages = options
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


def assert_no_spills(kernel, folder):
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups()
    assert (stack, local) == ("0", "0"), usage


def instructions(kernel):
    found = re.findall(r"(wgmma\.mma_async|mma\.sync)[\w.]*?\.(m\d+n\d+k\d+)[\w.]*?\.(s8|f16|bf16)", kernel.asm["ptx"])
    return {(name, kind) for name, _, kind in found}


def settings(capability):
    from qarvd_kernels.triton import configs

    return configs.table()[configs.architecture(divmod(capability, 10))]


EPILOGUES = {
    "plain": (0, {"out": HALF}),
    "gelu": (1, {"out": CODES, "out_scale": FLOAT, "out_zero_point": INT}),
    "residual": (2, {"out": HALF, "residual": HALF, "gate": FLOAT}),
}


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("capability", (80, 89, 90, 120))
def test_gemm(capability, epilogue, tmp_path):
    from qarvd_kernels.triton.gemm import dual_scale_gemm_kernel

    number, tensors = EPILOGUES[epilogue]
    entries = settings(capability)["gemm"]
    *blocks, warps, stages = entries["residual" if epilogue == "residual" else "default"]
    signature = {"a": CODES, "weight": CODES, "rows": "i32", "rows_per_gate": "i32", **tensors}
    signature |= dict.fromkeys(("ratio", "scale", "bias"), FLOAT)
    constants = {"N": N, "K": K, "OUTLIERS": OUTLIERS, "OUT_OUTLIERS": 128, "EPILOGUE": number}
    constants |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "STRIPE"), blocks, strict=True))
    kernel = compiled(dual_scale_gemm_kernel, signature, constants, capability, (warps, stages))
    assert instructions(kernel) == {("wgmma.mma_async" if capability == 90 else "mma.sync", "s8")}
    assert_no_spills(kernel, tmp_path)


@pytest.mark.parametrize("innermost", (0, 1))
@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("capability", (80, 89, 90, 120))
def test_attention(capability, dim, innermost, tmp_path):
    from qarvd_kernels.triton.attention import attention_int8_kernel

    rows, *options = settings(capability)["attention"][str(dim)]
    signature = {"query": HALF, "keys": CODES, "values": CODES, "key_scale": FLOAT, "value_scale": FLOAT}
    signature |= dict.fromkeys(("tokens", "room_key", "room_value", "pitch", "length"), "i32")
    signature |= {"score_scale": "fp32"}
    signature["result"] = HALF
    constants = {"HEADS": HEADS, "DIM": dim, "ROWS": rows, "KEYS": KEY_TILE, "INNERMOST": innermost}
    kernel = compiled(attention_int8_kernel, signature, constants, capability, options)
    name = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert instructions(kernel) == {(name, "s8"), (name, "f16")}
    if not innermost:  # that layout is for Hopper's own kernel; this one reads it where that one cannot run
        assert_no_spills(kernel, tmp_path)


@pytest.mark.parametrize("columns", (1536, 5120))
@pytest.mark.parametrize("modulated", (True, False))
@pytest.mark.parametrize("capability", (80, 90))
def test_norm(capability, modulated, columns, tmp_path):
    from qarvd_kernels.triton import norm

    signature = {"x": HALF, "y": HALF, "gate": FLOAT, "total": HALF, "codes": CODES, "channel_order": INT}
    signature |= {"input_scale": FLOAT, "input_zero_point": INT}
    signature |= dict.fromkeys(("scale", "shift") if modulated else ("weight", "norm_bias"), FLOAT)
    signature |= {"eps": "fp32", "rows_per_gate": "i32", "rows_per_scale": "i32"}
    block = norm._block(columns)
    constants = {"C": columns, "OUTLIERS": OUTLIERS, "BLOCK": block}
    options = (norm.row_warps(block), 1)
    assert_no_spills(compiled(norm.norm_quantize_kernel, signature, constants, capability, options), tmp_path)


@pytest.mark.parametrize("columns", (1536, 5120))
@pytest.mark.parametrize("capability", (80, 90))
def test_norm_with_a_scale_per_row(capability, columns, tmp_path):
    from qarvd_kernels.triton import norm

    signature = {"x": HALF, "y": HALF, "gate": FLOAT, "total": HALF, "codes": CODES, "row_scale": FLOAT}
    signature |= {"channel_scale": FLOAT}
    signature |= {"scale": FLOAT, "shift": FLOAT, "eps": "fp32", "rows_per_gate": "i32", "rows_per_scale": "i32"}
    block = norm._block(columns)
    constants = {"C": columns, "ROTATION": 128, "BITS": 7, "BLOCK": block}
    options = (norm.row_warps(block), 1)
    assert_no_spills(compiled(norm.norm_quantize_rows_kernel, signature, constants, capability, options), tmp_path)


@pytest.mark.parametrize(
    ("capability", "cache"), [(80, HALF), (80, CODES), (90, HALF), (90, CODES), (90, "*fp8e4nv")]
)  # compute capability 8.0 has no float8
def test_cache_append(capability, cache, tmp_path):
    from qarvd_kernels.triton.attention import qk_norm_rope_append_kernel

    signature = {"qkv": HALF, "key_cache": cache, "value_cache": cache, "query": HALF, "eps": "fp32"}
    signature |= dict.fromkeys(("q_weight", "k_weight", "cos", "sin"), FLOAT)
    signature |= dict.fromkeys(("tokens", "room_key", "room_value", "start"), "i32")
    if cache != HALF:
        signature |= {"key_scale": FLOAT, "value_scale": FLOAT}
    kernel = compiled(
        qk_norm_rope_append_kernel, signature, {"HEADS": HEADS, "DIM": 128, "ROOM": 16}, capability, (4, 1)
    )
    assert_no_spills(kernel, tmp_path)


@pytest.mark.parametrize("capability", (89, 90))
def test_values_with_tokens_innermost(capability, tmp_path):
    from qarvd_kernels.triton.attention import append_values_kernel

    signature = {"qkv": HALF, "value_cache": "*fp8e4nv", "value_scale": FLOAT}
    signature |= dict.fromkeys(("tokens", "room", "start"), "i32")
    constants = {"HEADS": HEADS, "DIM": 128, "TOKENS": 64}
    assert_no_spills(compiled(append_values_kernel, signature, constants, capability, (4, 1)), tmp_path)


@pytest.mark.parametrize("channels", (96, 192, 384))
@pytest.mark.parametrize("capability", (80, 90))
def test_channel_norm(capability, channels, tmp_path):
    from qarvd_kernels.triton import channel_norm

    signature = dict.fromkeys(("x", "bias", "weight", "past", "out"), HALF)
    signature |= dict.fromkeys(("new_rows", "old_rows", "zero_rows"), "i32")
    block = channel_norm._block(channels)
    constants = {"C": channels, "BLOCK": block, "ROWS": channel_norm._ELEMENTS // block}
    options = (channel_norm._WARPS, 1)
    assert_no_spills(compiled(channel_norm.rms_norm_silu_kernel, signature, constants, capability, options), tmp_path)
    signature = {**dict.fromkeys(("total", "x", "bias"), HALF), "rows": "i32"}
    assert_no_spills(compiled(channel_norm.add_bias_kernel, signature, constants, capability, options), tmp_path)


@pytest.mark.parametrize("capability", (80, 90))
def test_the_small_ones(capability, tmp_path):
    from qarvd_kernels.triton import gemm, linear, norm, quantize

    quantizer = {"channel_order": INT, "input_scale": FLOAT, "input_zero_point": INT, "codes": CODES}
    stored = {"packed": "*u8", "scale": FLOAT, "zero_point": "*i16", "channel_order": INT, "weight": HALF}
    sizes = {"K": K, "OUTLIERS": OUTLIERS, "BLOCK": 512}
    summed = {"x": HALF, "y": HALF, "gate": FLOAT, "total": HALF, "rows_per_gate": "i32"}
    for kernel, signature, constants in (
        (quantize.quantize_static_kernel, {"x": HALF, **quantizer, "rows": "i32", "zero": "i32"}, sizes),
        (quantize.row_sums_kernel, {"a": CODES, "sums": INT}, sizes),
        (linear.dequantize_weight_kernel, stored, {**sizes, "BITS": 4}),
        (gemm.expand_int4_kernel, {"packed": "*u8", "zero_point": "*i16", "out": CODES}, {**sizes, "BYTES": K // 2}),
        (norm.add_gated_kernel, summed, {"C": 1536, "BLOCK": 1024}),
    ):
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert_no_spills(compiled(kernel, signature, constants, capability, (4, 1)), tmp_path)


@pytest.mark.slow
def test_numerics_interpreted():
    """The numerical tests of this folder, with Triton's interpreter in place of a GPU."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    # Triton 3.6 interprets loops with a bound of its own only beside older versions of numpy.
    chosen = [] if version >= (3, 7) else ["-k", "not attention_int8"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("test_triton_numerics.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
