"""The CUDA matrix product: its build and cache on any machine with nvcc, its numbers on a Hopper GPU."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_inputs import grouped_layer

from qarvd_kernels.cuda import build as cuda_build
from qarvd_kernels.cuda import gemm
from qarvd_kernels.reference.linear import integer_weight

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH: install CUDA 12.5 or later")


def hopper_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 9.0 (Hopper)"
    return gemm.unsupported_reason("dual_scale_gemm", torch.device("cuda", 0), None)


gpu = [pytest.mark.gpu, pytest.mark.skipif(hopper_reason() is not None, reason=str(hopper_reason()))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no library remembered by this process."""
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    cuda_build._load.cache_clear()
    yield tmp_path / "kernels"
    cuda_build._load.cache_clear()


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """One function instead of the kernels, so that a build takes a second."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cu").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(cuda_build, "SOURCES", sources)
    return sources


def fake_nvcc(folder: Path, script: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


def test_tiles_are_those_that_are_compiled():
    source = (cuda_build.SOURCES / "gemm.cu").read_text()
    for tile in gemm._TILES:
        assert "Layout<{}, {}, {}>".format(*tile) in source
    assert {tuple(tile) for tile in gemm._tuned().values()} <= set(gemm._TILES)


@pytest.mark.parametrize(
    ("m", "n", "fastest"),
    [
        (77, 1536, (128, 128, 128)),
        (512, 4608, (128, 160, 128)),
        (512, 5120, (128, 160, 128)),
        (512, 13824, (128, 224, 128)),
        (880, 1536, (128, 128, 128)),
        (880, 8960, (128, 160, 128)),
        (1560, 1536, (128, 160, 128)),
        (1560, 4608, (128, 160, 128)),
        (1560, 8960, (128, 224, 128)),
        (1560, 13824, (192, 192, 128)),
        (3120, 1536, (128, 160, 128)),
        (3120, 4608, (128, 224, 128)),
    ],
)
def test_tiles_that_are_not_tuned_are_those_measured_fastest(m, n, fastest):
    """On 132 multiprocessors; the next best tile takes 3 to 31 % longer."""
    assert gemm._balanced(m, n, 132) == fastest


@needs_nvcc
@pytest.mark.slow
def test_kernels_compile_to_hopper_products_without_spills(tmp_path):
    command = [
        NVCC,
        *cuda_build.FLAGS,
        "-Xptxas",
        "-v",
        "--keep",
        "--keep-dir",
        tmp_path,
        "-o",
        tmp_path / "library.so",
    ]
    sources = sorted(cuda_build.SOURCES.glob("*.cu"))
    result = subprocess.run([*command, *sources], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert usage and set(usage) == {("0", "0", "0")}
    assert "serialized" not in result.stderr and "warning" not in result.stderr.lower()
    ptx = (tmp_path / "gemm.ptx").read_text()
    for _, columns, _ in gemm._TILES:
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8" in ptx
    assert "multicast::cluster" in ptx and "setmaxnreg" in ptx
    ptx = (tmp_path / "attention.ptx").read_text()
    for columns in (64, 136):
        assert f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3" in ptx


@needs_nvcc
def test_built_once_and_rebuilt_when_damaged(cache, small_sources):
    path = cuda_build.build()
    assert path.parent == cache and cuda_build.library().answer() == 42
    before = path.stat().st_mtime_ns
    assert cuda_build.build() == path and path.stat().st_mtime_ns == before
    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes([b[100] ^ 1]).join((b[:100], b[101:]))):
        broken = damage(path.read_bytes())
        path.unlink()
        path.write_bytes(broken)
        assert cuda_build.build() == path
        assert cuda_build._is_whole(path)
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == [".so"]


@needs_nvcc
def test_other_sources_are_another_library(cache, small_sources):
    first = cuda_build.build()
    (small_sources / "answer.cu").write_text('extern "C" int answer() { return 43; }\n')
    assert cuda_build.build() != first


@needs_nvcc
def test_two_processes_build_one_library(cache, small_sources):
    code = (
        "import sys; from pathlib import Path; from qarvd_kernels.cuda import build; "
        "build.SOURCES = Path(sys.argv[1]); print(build.build(), build.library().answer())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code, str(small_sources)], **pipes) for _ in range(2)]
    outputs, said = zip(*(process.communicate(timeout=120) for process in started), strict=True)
    assert outputs[0] == outputs[1] and outputs[0].endswith(" 42\n")
    assert len(list(cache.glob("*.so"))) == 1
    lines = "".join(said).splitlines()
    assert sum(line.startswith("Compiling the CUDA kernels with ") for line in lines) == 1, "and how long it takes"
    assert sum(line.startswith("Compiled in ") and str(cache) in line for line in lines) == 1
    assert len(lines) <= 3, "the third is that of a process that waits"


def test_without_a_compiler(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    reason = cuda_build.unavailable_reason()
    assert "no nvcc in CUDA_HOME=" in reason and "12.5" in reason
    with pytest.raises(cuda_build.BuildError, match="no nvcc"):
        cuda_build.library()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo "Cuda compilation tools, release 11.8, V11.8.89"', "is release 11.8, expected 12.5 or later"),
        ("exit 1", "does not run"),
        ("echo nonsense", "prints no release: 'nonsense'"),
        (
            'case "$1" in --version) echo "release 13.0, V13";; '
            "*) echo 'a.cu(1): fatal error: cuda_runtime.h: No such file or directory' >&2; exit 1;; esac",
            "cuda_runtime.h: No such file",
        ),
    ],
    ids=["too old", "broken", "no release", "no headers"],
)
def test_with_an_unusable_compiler(cache, monkeypatch, tmp_path, script, reason):
    fake_nvcc(tmp_path / "cuda", script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert reason in cuda_build.unavailable_reason()
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize("which", ["library", "folder"])
def test_what_others_can_write_is_not_loaded(cache, monkeypatch, tmp_path, which):
    """A library with a valid checksum, which anybody could have put there, is neither loaded nor replaced."""
    fake_nvcc(tmp_path / "cuda", 'echo "release 13.0, V13"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(cuda_build, "_compile", lambda nvcc, target: target.write_bytes(b"code"))
    library = cuda_build.build()
    path = library if which == "library" else cache
    path.chmod(path.stat().st_mode | 0o022)
    reason = cuda_build.unavailable_reason()
    assert str(path) in reason and "can be written by other users" in reason and "QARVD_CACHE" in reason
    path.chmod(path.stat().st_mode & ~0o022)
    assert cuda_build.build() == library


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give a file away")
def test_what_others_own_is_not_loaded(cache, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "cuda", 'echo "release 13.0, V13"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(cuda_build, "_compile", lambda nvcc, target: target.write_bytes(b"code"))
    os.chown(cuda_build.build(), 12345, -1)
    assert "belongs to another user (uid 12345)" in cuda_build.unavailable_reason()


@needs_nvcc
def test_without_a_place_to_write(monkeypatch, tmp_path, small_sources):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "file"))
    with pytest.raises(cuda_build.BuildError, match="QARVD_CACHE to a writable folder"):
        cuda_build.build()


def test_refuses_other_devices():
    names = (
        "dual_scale_gemm",
        "dual_scale_gemm_out",
        "dual_scale_gemm_gelu",
        "dual_scale_gemm_residual",
        "expand_int4",
    )
    for operator in names:
        assert "needs an NVIDIA GPU" in gemm.unsupported_reason(operator, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("k", "n", "outliers", "reason"),
    [
        (1536, 1536, 128, None),
        (1528, 1536, 128, "K is 1528, expected a multiple of 16"),
        (1536, 1544, 128, "N is 1544, expected a multiple of 32"),
        (1536, 1536, 24, "num_outliers is 24, expected a multiple of 16"),
    ],
)
def test_refuses_other_sizes(k, n, outliers, reason):
    arguments = {
        "a": torch.empty(7, k, dtype=torch.int8),
        "weight": torch.empty(n, k, dtype=torch.int8),
        "num_outliers": outliers,
    }
    assert gemm._unsupported_gemm(arguments) == reason


def test_refuses_what_is_not_contiguous():
    arguments = {
        "a": torch.empty(7, 64, dtype=torch.int8),
        "weight": torch.empty(64, 32, dtype=torch.int8).t(),
        "num_outliers": 16,
    }
    assert gemm._unsupported_gemm(arguments) == "weight is not contiguous"
    arguments["weight"], arguments["out"] = torch.empty(32, 64, dtype=torch.int8), torch.empty(32, 7).t()
    assert gemm._unsupported_gemm(arguments) == "out is not contiguous"


# ---- on the GPU

SHAPES = [  # M, N, K, outliers
    (1, 32, 16, 0),
    (7, 192, 144, 16),
    (129, 288, 400, 96),
    (257, 640, 256, 256),
    (1560, 1568, 1536, 32),
    (4680, 1536, 1536, 128),
    (4683, 4608, 1536, 128),
]


def make(m, n, k, extreme=False):
    def codes(*shape):
        if extreme:
            return torch.full(shape, -128, dtype=torch.int8, device="cuda")
        return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")

    torch.manual_seed(m + n + k)
    ratio, scale = torch.rand(n, device="cuda") * 8 + 0.3, (torch.rand(n, device="cuda") + 0.5) / (128 * k)
    return codes(m, k), codes(n, k), ratio, scale, torch.randn(n, device="cuda")


def exact(a, weight):
    """int32 product, through float64: every sum below 2**53 is exact."""
    return (a.double() @ weight.double().T).to(torch.int32)


def accumulate(a, weight, outliers, ratio):
    first, rest = exact(a[:, :outliers], weight[:, :outliers]), exact(a[:, outliers:], weight[:, outliers:])
    return (first.float() * ratio).round().to(torch.int32) + rest


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def poison(*shape, dtype):
    """Leaves a freed block of garbage of this size, which the next allocation most likely gets."""
    torch.empty(shape, dtype=dtype, device="cuda").view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "all lowest"])
@pytest.mark.parametrize(("m", "n", "k", "outliers"), SHAPES)
class TestOnGPU:
    pytestmark = gpu

    def test_accumulator_is_bit_equal(self, m, n, k, outliers, extreme):
        a, weight, ratio, scale, bias = make(m, n, k, extreme)
        expected = accumulate(a, weight, outliers, ratio)
        poison(m, n, dtype=torch.int32)
        got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, None, None, None, torch.int32)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 2e-3), (torch.float16, 4e-4), (torch.float32, 1e-6)]
    )
    def test_scaled(self, m, n, k, outliers, extreme, dtype, tolerance):
        a, weight, ratio, scale, bias = make(m, n, k, extreme)
        y = accumulate(a, weight, outliers, ratio).double() * scale.double() + bias.double()
        poison(m, n, dtype=dtype)
        got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, None, None, None, dtype)
        assert relative_error(got, y) <= tolerance
        out = torch.full_like(got, 7)
        gemm.dual_scale_gemm_out(a, weight, outliers, ratio, scale, bias, None, None, None, out)
        assert torch.equal(out, got)

        rows = torch.rand(m, device="cuda") + 0.1
        got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, None, None, rows, dtype)
        sums = accumulate(a, weight, outliers, ratio).double() * rows.double()[:, None]
        assert relative_error(got, sums * scale.double() + bias.double()) <= tolerance

        sums = torch.stack([a[:, :outliers].sum(1), a[:, outliers:].sum(1)], 1).to(torch.int32)
        sum_scale = torch.randn(2, n, device="cuda") / k
        y -= sums.double() @ sum_scale.double()
        got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, sums, sum_scale, None, dtype)
        assert relative_error(got, y) <= tolerance

    def test_gelu(self, m, n, k, outliers, extreme):
        a, weight, ratio, scale, bias = make(m, n, k, extreme)
        y = accumulate(a, weight, outliers, ratio).double() * scale.double() + bias.double()
        out_scale, zero_point = torch.tensor([0.031, 0.017], device="cuda"), torch.tensor([6, 11], device="cuda")
        out_outliers = n // 2 // 16 * 16
        group = (torch.arange(n, device="cuda") >= out_outliers).long()
        y = torch.nn.functional.gelu(y, approximate="tanh")
        expected = ((y / out_scale.double()[group]).round() + zero_point[group]).clamp(0, 255) - 128
        poison(m, n, dtype=torch.int8)
        got = gemm.dual_scale_gemm_gelu(
            a, weight, outliers, ratio, scale, bias, None, None, None, out_scale, zero_point.int(), out_outliers
        )
        difference = (got.double() - expected).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() <= max(1e-3, 1 / (m * n))

    def test_residual(self, m, n, k, outliers, extreme):
        a, weight, ratio, scale, bias = make(m, n, k, extreme)
        y = accumulate(a, weight, outliers, ratio).double() * scale.double() + bias.double()
        residual = torch.randn(m, n, device="cuda").bfloat16()
        gates = 3 if m % 3 == 0 else 1
        for gate in (None, torch.randn(gates, n, device="cuda")):
            factor = 1 if gate is None else gate.double().repeat_interleave(m // gates, 0)
            got = gemm.dual_scale_gemm_residual(
                a, weight, outliers, ratio, scale, bias, None, None, None, residual, gate
            )
            assert relative_error(got, residual.double() + factor * y) <= 2e-3


class TestMoreOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("tile", gemm._TILES)
    def test_every_tile(self, tile, monkeypatch):
        monkeypatch.setattr(gemm, "tile", lambda *_: tile)
        for m, n, k, outliers in SHAPES:
            a, weight, ratio, scale, bias = make(m, n, k)
            expected = accumulate(a, weight, outliers, ratio)
            got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, None, None, None, torch.int32)
            assert torch.equal(got, expected), (m, n, k, outliers)
            got = gemm.dual_scale_gemm(a, weight, outliers, ratio, scale, bias, None, None, None, torch.bfloat16)
            assert relative_error(got, expected.double() * scale.double() + bias.double()) <= 2e-3

    @pytest.mark.parametrize("factor", (3.0, 60.0))
    def test_sums_beyond_what_additions_round(self, factor):
        """At the border between the groups, some or all of them reach 2^22."""
        a, weight, ratio, scale, bias = make(300, 512, 512)
        a[:100, :128], weight[::2, :128] = -128, -128
        ratio = ratio * factor
        expected = accumulate(a, weight, 128, ratio)
        assert 2**22 < expected.abs().max() < 2**31 - 1
        got = gemm.dual_scale_gemm(a, weight, 128, ratio, scale, bias, None, None, None, torch.int32)
        assert torch.equal(got, expected)

    def test_views(self):
        a, weight, ratio, scale, bias = make(300, 512, 512)
        for view in (a[:, 128:384], a[:, 8:264], a[5:, 256:]):
            got = gemm.dual_scale_gemm(
                view, weight[:, :256].contiguous(), 64, ratio, scale, bias, None, None, None, torch.int32
            )
            assert torch.equal(got, accumulate(view, weight[:, :256], 64, ratio))

    def test_runs_in_a_graph_and_on_a_stream(self):
        a, weight, ratio, scale, bias = make(256, 512, 512)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        arguments = (a, weight, 128, ratio, scale, bias, None, None, None, torch.int32)
        with torch.cuda.stream(stream):
            gemm.dual_scale_gemm(*arguments)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = gemm.dual_scale_gemm(*arguments)
        a.copy_(torch.randint_like(a, -128, 127))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, accumulate(a, weight, 128, ratio))

    def test_one_scratch_for_layers_in_turn(self):
        """Kernels overlap the end of the one before: no expansion may overtake the product that reads its scratch."""
        a, _, ratio, scale, bias = make(1000, 1536, 1536)
        packed = [torch.randint(0, 256, (1536, 768), dtype=torch.uint8, device="cuda") for _ in range(3)]
        zero_points = torch.randint(0, 16, (1536, 2), dtype=torch.int16, device="cuda")
        scratch = torch.empty((1536, 1536), dtype=torch.int8, device="cuda")

        def product(weight, out):
            gemm.expand_int4(weight, zero_points, 128, out)
            return gemm.dual_scale_gemm(a, out, 128, ratio, scale, bias, None, None, None, torch.int32)

        wants = [product(weight, torch.empty_like(scratch)) for weight in packed]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gots = [product(weight, scratch) for _ in range(20) for weight in packed]
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(got, want) for got, want in zip(gots, wants * 20, strict=True))

    @pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 1536), (1536, 8960), (64, 48)])
    def test_expand_int4_in_groups(self, n, k):
        packed, _, groups, *_ = grouped_layer(n, k, 0)
        out = torch.full((n, k), 77, dtype=torch.int8, device="cuda")
        gemm.expand_int4(packed.cuda(), groups.cuda(), 0, out)
        assert torch.equal(out.cpu(), integer_weight(packed, groups, 4, 0)[0])

    @pytest.mark.parametrize(("n", "k", "outliers"), [(1, 16, 0), (33, 1536, 128), (1536, 8960, 8960), (64, 48, 16)])
    def test_expand_int4(self, n, k, outliers):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        zero_point = torch.randint(-3, 20, (n, 2), dtype=torch.int16, device="cuda")
        out = torch.full((n, k), 77, dtype=torch.int8, device="cuda")
        gemm.expand_int4(codes[:, 0::2] | codes[:, 1::2] << 4, zero_point, outliers, out)
        offset = zero_point.clamp(0, 15).to(torch.int8)
        expected = codes.view(torch.int8).clone()
        expected[:, :outliers] -= offset[:, :1]
        expected[:, outliers:] -= offset[:, 1:]
        assert torch.equal(out, expected)

    def test_misaligned_parameters_are_an_error(self):
        a, weight, ratio, scale, bias = make(64, 64, 64)
        shifted = torch.cat([scale, scale])[1:65]
        with pytest.raises(RuntimeError, match="misaligned"):
            gemm.dual_scale_gemm(a, weight, 16, ratio, shifted, bias, None, None, None, torch.float32)
