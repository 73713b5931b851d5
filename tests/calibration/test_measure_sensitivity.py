"""Chunk sensitivity through a pipeline: equal to the naive method, to the reference, and after an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration.calibrate import calibrate
from qarvd_diffusers.calibration.measure_sensitivity import chunk_errors, measure_sensitivity
from qarvd_diffusers.calibration.sensitivity import SensitivityResult
from qarvd_diffusers.calibration.switch import QuantizationSwitch
from qarvd_diffusers.calibration.targets import prompt_linears
from qarvd_diffusers.quantization.install import quantized_layers

PROMPTS = ("a red circle", "a blue square moves left")
SEED = 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARVD_CACHE", str(tmp_path / "cache"))


def config(scheme="w4a8", **options):
    return QARVDConfig(scheme, calibration_prompts=("a green triangle",), calibration_chunks=3, **options)


def naive(pipe, config, prompt, seed, num_chunks):
    """A whole rollout per chunk, straight through the public stream."""
    layers = quantized_layers(
        pipe.transformer, pipe.calibrate(config.replace(chunk_weights="uniform", rounding="nearest"))
    )
    if not config.reference_compat:
        layers = {k: v for k, v in layers.items() if k not in prompt_linears(pipe.transformer, layers)}

    def rollout(k):
        with QuantizationSwitch(pipe.transformer, layers) as switch:
            stream = pipe.stream(
                prompt,
                num_chunks=num_chunks,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
                on_pass=lambda info: switch.set(info.chunk == k),
            )
            return [chunk.latents for chunk in stream]

    reference = rollout(None)
    return tuple(
        tuple((a.double() - b.double()).square().mean().item() for a, b in zip(rollout(k), reference, strict=True))
        for k in range(num_chunks)
    )


@pytest.mark.parametrize(
    ("scheme", "options", "fields"),
    [
        ("w4a8", {}, {}),
        ("w8a8", {"reference_compat": True}, {}),
        ("w4a16", {}, {"independent_first_frame": True, "local_attention_frames": 6, "sink_frames": 1}),
    ],
)
def test_equal_to_the_naive_method_to_the_last_bit(tiny_pipeline, scheme, options, fields):
    pipe = tiny_pipeline
    if fields:
        pipe = ARVDPipeline(**pipe.components, height=32, width=48, max_sequence_length=12, **fields)
        pipe.set_progress_bar_config(disable=True)
    before = dict(pipe.transformer.named_modules())
    found = pipe.measure_sensitivity(config(scheme, **options), PROMPTS, num_chunks=4, seed=SEED)
    assert found.errors == tuple(
        naive(pipe, config(scheme, **options), prompt, SEED + i, 4) for i, prompt in enumerate(PROMPTS)
    )
    assert all(row[c] == 0 for matrix in found.errors for k, row in enumerate(matrix) for c in range(k))
    assert min(found.sensitivity) > 0
    assert all(before[name] is module for name, module in pipe.transformer.named_modules())


def test_cost(tiny_pipeline):
    """The float rollout once, and every chunk's branch from that chunk on; no rollout refreshes its last chunk."""
    passes = []
    run_pass = tiny_pipeline.run_pass
    tiny_pipeline.run_pass = lambda *args, **kwargs: passes.append(kwargs["frame_offset"]) or run_pass(*args, **kwargs)
    tiny_pipeline.measure_sensitivity(config("w4a16"), PROMPTS[:1], num_chunks=4)
    assert len(passes) == 5 * (4 + 4 * 5 // 2) - (1 + 4)


def test_chunk_weights_fit_the_config(tiny_pipeline):
    found = tiny_pipeline.measure_sensitivity(config(chunk_weights="published"), PROMPTS, num_chunks=3)
    weighted = config(chunk_weights=found.chunk_weights)
    tiny_pipeline.quantize(weighted)
    assert tiny_pipeline.quantization.chunk_weights == found.chunk_weights
    with pytest.raises(ValueError, match="quantized already"):
        tiny_pipeline.measure_sensitivity(config(), PROMPTS)


def test_bad_input(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"all 2 prompts are the same \('a red circle'\)"):
        tiny_pipeline.measure_sensitivity(config(), ["a red circle"] * 2)
    for prompts in ((), ("a", " "), "a red circle"):
        with pytest.raises(ValueError, match="at least one non-empty prompt"):
            tiny_pipeline.measure_sensitivity(config(), prompts)


class ShortPipeline(ARVDPipeline):
    """Its streams end after two chunks."""

    def make_loop(self, inputs, **text):
        loop = super().make_loop(inputs, **text)
        loop.inputs.num_chunks = min(2, loop.inputs.num_chunks)
        return loop


def test_a_chunk_that_is_never_reached_is_named(tiny_pipeline):
    pipe = ShortPipeline(**tiny_pipeline.components, height=32, width=48, max_sequence_length=12)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(
        ValueError, match="prompt 0: with chunk 0 quantized: chunk 2 was never reached: the rollout ended before it"
    ):
        measure_sensitivity(pipe, config("w4a16"), PROMPTS, num_chunks=3)


def test_nan_is_named_and_the_file_stays_usable(tiny_pipeline, tmp_path):
    path = tmp_path / "x.json"
    pipe, calls = tiny_pipeline, []
    run_pass = pipe.run_pass

    def failing(*args, **kwargs):
        calls.append(1)
        flow = run_pass(*args, **kwargs)
        return flow * torch.nan if len(calls) == 22 + 5 + 3 else flow

    pipe.run_pass = failing  # prompt 0 takes 22 passes, the first chunk of the first branch of prompt 1 five more
    with pytest.raises(
        FloatingPointError, match="prompt 1: with chunk 0 quantized: NaN or infinity in chunk 1, step 2"
    ):
        pipe.measure_sensitivity(config("w4a16"), (*PROMPTS, "a red square"), num_chunks=2, seed=SEED, path=path)
    assert len(SensitivityResult.load(path, partial=True).errors) == 1
    pipe.run_pass = run_pass
    continued = pipe.measure_sensitivity(
        config("w4a16"), (*PROMPTS, "a red square"), num_chunks=2, seed=SEED, path=path
    )
    assert continued == pipe.measure_sensitivity(config("w4a16"), (*PROMPTS, "a red square"), num_chunks=2, seed=SEED)


def test_a_full_disk_is_named_and_the_file_stays_usable(tiny_pipeline, tmp_path):
    resource = pytest.importorskip(
        "resource", reason="run it on Linux or macOS"
    )  # a limit on file sizes stands in for the full disk
    before, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "x.json"
    measure = partial(tiny_pipeline.measure_sensitivity, config("w4a16"), num_chunks=2, seed=SEED)
    want = measure(PROMPTS)
    size = want.save(tmp_path / "want.json").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))  # one prompt fits, two do not
    try:
        with pytest.raises(
            OSError, match=r"x.json could not be written .*free some space and run again, it continues"
        ):
            measure(PROMPTS, path=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(SensitivityResult.load(path, partial=True).errors) == 1
    assert measure(PROMPTS, path=path) == want
    assert sorted(file.name for file in tmp_path.iterdir()) == ["want.json", "x.json"]


def test_a_file_of_something_else_is_refused_by_name(tiny_pipeline, tmp_path):
    path = tmp_path / "x.json"
    measure = tiny_pipeline.measure_sensitivity
    done = measure(config(), PROMPTS, num_chunks=2, path=path)
    assert measure(config(), PROMPTS, num_chunks=2, path=path) == done
    assert "circle" not in path.read_text(), "prompts may be private"
    for arguments, options, name in (
        ((config("w8a8"), PROMPTS), {}, "config"),
        ((config(), PROMPTS[::-1]), {}, "prompts"),
        ((config(), PROMPTS), {"seed": 1}, "seed"),
        ((config(), PROMPTS), {"num_chunks": 3}, "num_chunks"),
        ((config().replace(calibration_prompts=("a",)), PROMPTS), {}, "calibration"),
    ):
        with pytest.raises(ValueError, match=rf"x.json holds another measurement \({name}: stored"):
            measure(*arguments, **{"num_chunks": 2, "path": path} | options)
    with torch.no_grad():
        tiny_pipeline.transformer.proj_out.bias += 1
    with pytest.raises(ValueError, match=r"x.json holds another measurement \(model: stored"):
        measure(config(), PROMPTS, num_chunks=2, path=path)
    assert json.loads(path.read_text())["complete"]


WORKER = """
import sys, torch
from qarvd_diffusers import ARVDPipeline, QARVDConfig
torch.set_num_threads(int(sys.argv[3]))
pipe = ARVDPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
config = QARVDConfig("w4a8", calibration_prompts=("a green triangle",), calibration_chunks=3)
prompts = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "triangle")]
pipe.calibrate(config.replace(chunk_weights="uniform", rounding="nearest"))
passes, run_pass = [], pipe.run_pass
pipe.run_pass = lambda *args, **kwargs: passes.append(1) or run_pass(*args, **kwargs)
pipe.measure_sensitivity(config, prompts, num_chunks=3, path=sys.argv[2])
print(len(passes))
"""


@pytest.mark.slow
def test_killed_and_continued(tiny_pipeline, tmp_path):
    """kill -9 in the middle: the second run only does the rest, and the file is the same byte for byte."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    prompts = [
        f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "triangle")
    ]
    pipe = ARVDPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.measure_sensitivity(config(), prompts, num_chunks=3, path=whole)

    def start(path):
        arguments = (str(tmp_path / "model"), str(path), str(torch.get_num_threads()))
        command = [sys.executable, "-c", WORKER, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    worker = start(broken)
    deadline = time.monotonic() + 300
    while not (broken.exists() and len(SensitivityResult.load(broken, partial=True).errors) >= 2):
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    partial = SensitivityResult.load(broken, partial=True)
    assert 2 <= len(partial.errors) < 9, "killed too late to show anything"
    worker = start(broken)
    out, log = worker.communicate(timeout=300)
    assert worker.returncode == 0, log
    assert int(out) == (9 - len(partial.errors)) * (9 * 5 - 4), "only the remaining prompts were rolled out"
    assert broken.read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The public reference implementation


@pytest.fixture(scope="module")
def reference_rollouts(golden):
    """Our calibration and sensitivity on the data of the golden measurement, for one choice of layers."""
    data = golden.file("D_frame_sensitivity.safetensors")
    stored = golden.file("A_inputs.safetensors")
    info = json.loads((golden.folder / "D_frame_sensitivity.json").read_text())
    chunks, frames = info["n_chunks"], golden.original_config().get("num_frame_per_block", 3)
    pipe = ARVDPipeline(
        golden.transformer(),
        denoising_timesteps=golden.file("B_scheduler.safetensors")["denoising_step_list_raw"].tolist(),
        num_frames_per_chunk=frames,
    )
    pipe.set_progress_bar_config(disable=True)

    def embeds_and_noise(prefix):
        return {
            "prompt_embeds": stored[f"{prefix}prompt_embeds"],
            "latents": stored[f"{prefix}noise"],
            "renoise_latents": stored[f"{prefix}renoise"].transpose(2, 3).unsqueeze(2),
        }

    def run(**options):
        config = QARVDConfig(
            f"w{info['w_bits']}a{info['a_bits']}",
            reference_compat=True,
            outlier_alignment=32,
            chunk_weights="uniform",
            rounding="nearest",  # sensitivity comes before rounding
            calibration_chunks=chunks,
            **options,
        )

        def rollout(on_pass):
            for _ in pipe.stream(**embeds_and_noise("act_init_"), output_type="latent", on_pass=on_pass):
                pass

        result = calibrate(pipe.transformer, rollout, config)
        layers = quantized_layers(pipe.transformer, result)
        given = embeds_and_noise("")
        embeds = given.pop("prompt_embeds")
        inputs = pipe.check_stream_inputs(
            prompt=None, prompt_embeds=embeds, height=None, width=None, output_type="latent", num_chunks=None,
            num_frames=None, initial_latents=None, generator=None, **given,
        )  # fmt: skip
        with QuantizationSwitch(pipe.transformer, layers) as switch:
            errors = chunk_errors(pipe.make_loop(inputs, prompt_embeds=embeds), chunks, switch)
            switch.set(True)
            latents = pipe(prompt_embeds=embeds, **given, output_type="latent").frames
        full = (latents - data["latents_fp"]).square().mean().item()
        return result, SensitivityResult({}, 1, (frames,) * chunks).with_prompt(errors), full

    return info, run


def check_reference(state, full, want, full_want):
    sensitivity = torch.tensor(state.sensitivity)
    torch.testing.assert_close(sensitivity, torch.tensor(want["errors"]), rtol=0.05, atol=0)
    torch.testing.assert_close(sensitivity / sensitivity.sum(), torch.tensor(want["weights"]), rtol=0, atol=0.01)
    assert full == pytest.approx(full_want, rel=0.05)


def original_names(layers):
    """Names of the golden data -> ours."""
    block = {"attn1": "self_attn", "attn2": "cross_attn"}
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    names = {}
    for name in layers:
        original = name.replace("condition_embedder.text_embedder.linear_1", "text_embedding.0")
        original = original.replace("condition_embedder.text_embedder.linear_2", "text_embedding.2")
        for ours, theirs in (*block.items(), *parts.items()):
            original = original.replace(ours, theirs)
        names[original] = name
    return names


def test_reference(reference_rollouts):
    """Golden set D: activation ranges, errors and weights of the reference implementation, within its tolerances."""
    info, run = reference_rollouts
    result, state, full = run()
    check_reference(state, full, info, info["mse_all_chunks_quantized_w4a8"])
    torch.testing.assert_close(
        torch.tensor(state.errors[0]), torch.tensor(info["error_matrix_k_by_chunk"]), rtol=0.1, atol=1e-5
    )
    names = original_names(result.layers)
    assert set(names) == set(info["layers"])
    for original, want in info["layers"].items():
        layer = result.layers[names[original]]
        found = layer.input_scale.tolist()
        dual = want["use_dual_scale"]
        assert layer.description.num_outliers == (want["n_outlier"] if dual else 0), original
        if dual:
            assert found == pytest.approx([want["act_delta_outlier"], want["act_delta_normal"]], rel=1e-2), original
        else:
            assert found[1] == pytest.approx(want["act_delta"], rel=1e-2), original


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("without_dual_scale", {"outlier_detector": "none"}),
        ("variant_text_embedding_left_unquantised", {"modules_to_not_convert": ("text_embedder",)}),
    ],
)
def test_reference_variants(reference_rollouts, variant, options):
    info, run = reference_rollouts
    want = info[variant]
    _, state, full = run(**options)
    check_reference(state, full, want, want["mse_all_chunks_quantized_w4a8"])
