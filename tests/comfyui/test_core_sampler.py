"""Quantized models in ComfyUI's own causal Wan model and sampler (which ComfyUI 0.3.75 does not have)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from graphs import BUNDLED, PROMPT, node, quantize_graph, read_video
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qarvd_diffusers import ARVDPipeline, bundled_model_path
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import adherence

pytestmark = pytest.mark.slow


@pytest.fixture
def causal(server):
    if server.version < (0, 27):
        pytest.skip(
            f"ComfyUI {'.'.join(map(str, server.version))} has no causal Wan model with int8; COMFYUI_PATH may name "
            f"one"
        )


def sampled(model: list, seed: int = 0) -> dict:
    """ComfyUI's own nodes from a MODEL to latents in "26"; the pipeline is "11"."""
    return {
        "21": node("QARVDEncodePrompt", pipeline=["11", 0], text=PROMPT),
        "22": node("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0),
        "23": node("CFGGuider", model=model, positive=["21", 0], negative=["21", 0], cfg=1.0),
        "24": node("EmptyARVideoLatent", width=64, height=64, length=33, batch_size=1),
        "25": node("SamplerARVideo", num_frame_per_block=3),
        "27": node("RandomNoise", noise_seed=seed),
        "26": node(
            "SamplerCustomAdvanced",
            noise=["27", 0],
            guider=["23", 0],
            sampler=["25", 0],
            sigmas=["22", 0],
            latent_image=["24", 0],
        ),
    }


def decoded(graph: dict, latent: list) -> dict:
    return {
        **graph,
        "31": node("QARVDDecode", pipeline=["11", 0], latent=latent),
        "32": node("CreateVideo", images=["31", 0], fps=16.0),
        "33": node("SaveVideo", video=["32", 0], filename_prefix="video/core", format="auto", codec="auto"),
    }


def test_without_a_causal_model_in_comfyui_the_node_says_so(server):
    if server.version >= (0, 21):
        pytest.skip("this ComfyUI has one: COMFYUI_PATH may name a version before 0.21")
    graph = {"11": node("QARVDLoadPipeline", model=BUNDLED), "12": node("QARVDToModel", pipeline=["11", 0])}
    graph |= {"13": node("ModelSave", model=["12", 0], filename_prefix="x")}
    run = server.run(graph)
    assert run.error.splitlines()[0].startswith("ComfyUI 0.3.75 has no causal Wan model")
    assert run.error.splitlines()[1].startswith("Update ComfyUI")


@pytest.mark.parametrize("scheme", ["float", "w4a8"])
def test_to_model_samples_in_comfyui(server, causal, scheme):
    graph = {"11": node("QARVDLoadPipeline", model=BUNDLED)}
    if scheme != "float":
        graph["12"] = node("QARVDQuantize", pipeline=["11", 0], scheme=scheme, calibration_chunks=2)
    graph["13"] = node("QARVDToModel", pipeline=["11" if scheme == "float" else "12", 0])
    run = server.run(decoded({**graph, **sampled(["13", 0])}, ["26", 0]))
    assert run.status == "success", run.error
    video = read_video(server.files(run, "33")[0])
    assert video.shape == (33, 64, 64, 3)
    assert adherence(video, PROMPT).correct


def test_a_lora_changes_the_quantized_model_and_only_while_it_is_connected(server, causal):
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.blocks.2.ffn.0"
    lora = {
        f"{name}.lora_A.weight": 0.3 * torch.randn(4, 256, generator=generator),
        f"{name}.lora_B.weight": 0.3 * torch.randn(576, 4, generator=generator),
    }
    save_file(lora, server.base / "models" / "loras" / "test.safetensors")
    base = quantize_graph("w8a16")
    base["13"] = node("QARVDToModel", pipeline=["12", 0])
    base["14"] = node("LoraLoaderModelOnly", model=["13", 0], lora_name="test.safetensors", strength_model=1.0)
    videos = []
    for model, seed in ((["13", 0], 5), (["14", 0], 5), (["13", 0], 5)):
        run = server.run(decoded({**base, **sampled(model, seed)}, ["26", 0]))
        assert run.status == "success", run.error
        videos.append(read_video(server.files(run, "33")[0]).astype(int))
        server.post("/free", {"free_memory": True})
    changed, again = (np.abs(videos[0] - other).mean() for other in videos[1:])
    assert again < 1 < 3 * again + 1 < changed, (
        changed,
        again,
    )  # equal runs differ in the last bit, which H.264 enlarges


@pytest.mark.parametrize("scheme", ["float", "w8a16"])
def test_core_save_model_is_refused_with_the_node_to_use(server, causal, scheme):
    graph = (
        {"11": node("QARVDLoadPipeline", model=BUNDLED)} if scheme == "float" else quantize_graph(scheme, "to-save")
    )
    graph["14"] = node("QARVDToModel", pipeline=["11" if scheme == "float" else "12", 0])
    graph["15"] = node("ModelSave", model=["14", 0], filename_prefix="diffusion_models/refused")
    problem, remedy = server.run(graph).error.strip().splitlines()
    assert "own savers cannot write" in problem and "Q-ARVD Save Quantized" in remedy
    assert not list((server.base / "output").rglob("refused*"))


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a16"])
def test_int8_file_runs_in_comfyui(server, causal, scheme):
    """UNETLoader reads the export; ComfyUI then knows Wan's latent statistics only, so decoding is done here."""
    graph = quantize_graph(scheme, f"core-{scheme}", rounding="nearest")
    graph["13"]["inputs"]["format"] = "ComfyUI int8 file"
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "lost:" in run.text("13")
    file = server.base / "output" / "diffusion_models" / f"core-{scheme}.safetensors"
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["config"])["transformer"]["causal_ar"]
        weight = stored.get_tensor("blocks.0.ffn.0.weight")
        assert weight.dtype == torch.int8 and stored.get_tensor("blocks.0.ffn.0.weight_scale").shape == (576, 1)
    graph = {"11": node("QARVDLoadPipeline", model=BUNDLED)}
    graph["12"] = node("UNETLoader", unet_name=f"core-{scheme}.safetensors", weight_dtype="default")
    graph |= sampled(["12", 0])
    graph["34"] = node("SaveLatent", samples=["26", 0], filename_prefix="latents/core")
    run = server.run(graph)
    assert run.status == "success", run.error
    saved = run.history["outputs"]["34"]["latents"][0]
    raw = load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"].float()
    wan = AutoencoderKLWan().config
    mean, std = (torch.tensor(wan[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    pipe = ARVDPipeline.from_pretrained(bundled_model_path())
    with torch.no_grad():
        pixels = pipe.make_decoder().decode((raw - mean) / std)[0].permute(1, 2, 3, 0)
    assert adherence(to_uint8((pixels / 2 + 0.5).numpy()), PROMPT).correct
