"""Models where ComfyUI keeps them, with the VAE that ComfyUI loads."""

from __future__ import annotations

import subprocess

import comfy_server
import numpy as np
import pytest
import torch
from graphs import BUNDLED, PROMPT, node, stream_graph
from safetensors.torch import load_file, save_file

from qarvd_diffusers import (
    ARVDPipeline,
    CausalWanTransformer3DModel,
    bundled_model_path,
    convert_checkpoint,
    to_original_keys,
)

pytestmark = pytest.mark.slow

FILE = "wan/deep/er/self_forcing_dmd.safetensors"
# A small Wan VAE under its original names, from ComfyUI's own class.
VAE = """
import sys
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import torch
from comfy.ldm.wan.vae import WanVAE
from safetensors.torch import save_file
torch.manual_seed(0)
vae = WanVAE(dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
state = {k: torch.ones(v.shape) if k.endswith("gamma") else 0.1 * torch.randn(v.shape) for k, v in
         vae.state_dict().items()}
save_file(state, sys.argv[2])
"""


@pytest.fixture(scope="module")
def server(comfy_tree, tmp_path_factory):
    """A server whose diffusion models lie in a folder of extra_model_paths.yaml."""
    shelf = tmp_path_factory.mktemp("shelf")
    (shelf / "unets" / FILE).parent.mkdir(parents=True)
    (shelf / "vae").mkdir()
    config = shelf / "paths.yaml"
    config.write_text(f"shelf:\n  base_path: {shelf}\n  diffusion_models: unets\n  vae: vae\n")
    flags = ("--cpu", "--extra-model-paths-config", str(config))
    running = comfy_server.Server(comfy_tree, tmp_path_factory.mktemp("comfyui"), flags=flags)
    running.shelf = shelf
    command = [comfy_server.python(), "-c", VAE, str(comfy_tree), str(shelf / "vae" / "wan_small.safetensors")]
    subprocess.run(command, check=True, capture_output=True)
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=256, ffn_dim=512, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    tensors = {name: tensor.detach().clone() for name, tensor in to_original_keys(model.state_dict()).items()}
    save_file(tensors, shelf / "unets" / FILE)
    running.start()
    yield running
    running.stop()
    assert not running.failed_imports()


def graph_of(**options) -> dict:
    """Stream "3" of the file, with the prompt of the bundled pipeline "11", which has embeddings of the same size."""
    graph = stream_graph(
        node("QARVDLoadDiffusionModel", model=FILE, vae=["10", 0], rollout="self-forcing"), chunks=2, preview="off",
        width=64, height=64, **options,
    )  # fmt: skip
    graph["10"] = node("VAELoader", vae_name="wan_small.safetensors")
    graph["11"] = node("QARVDLoadPipeline", model=BUNDLED)
    graph["2"] = node("QARVDEncodePrompt", pipeline=["11", 0], text=PROMPT)
    return graph


def test_a_file_of_comfyui_streams_with_its_vae(server, tmp_path):
    """The latents are those of the converted folder, the pictures those of ComfyUI's VAE Decode; no file is made."""
    graph = graph_of()
    graph["20"] = node("SaveLatent", samples=["3", 1], filename_prefix="latents/core")
    graph["21"] = node("VAEDecode", samples=["3", 1], vae=["10", 0])
    graph["22"] = node("QARVDCompare", images_a=["3", 0], images_b=["21", 0])
    run = server.run(graph)
    assert run.status == "success", run.error
    assert not list((server.base / "output").rglob(".converted"))
    psnr = [float(row.split()[1]) for row in run.text("22").splitlines()[1:]]
    assert min(psnr) > 60, psnr
    entry = run.history["outputs"]["20"]["latents"][0]
    raw = load_file(server.base / entry["type"] / entry["subfolder"] / entry["filename"])["latent_tensor"]
    folder = convert_checkpoint(server.shelf / "unets" / FILE, tmp_path / "folder", "self-forcing")
    bundled = ARVDPipeline.from_pretrained(bundled_model_path())
    embeds = bundled.encode_prompt(PROMPT).float()
    pipe = ARVDPipeline.from_pretrained(folder, vae=None)
    stream = pipe.stream(
        prompt_embeds=embeds, num_chunks=2, width=64, height=64, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = torch.cat([chunk.latents for chunk in stream], dim=2).float()
    scales = ([row.numpy() for row in torch.unbind(latents[0].flatten(1))] for latents in (raw, expected))
    for ours, theirs in zip(*scales, strict=True):  # raw and normalized latents differ by an affine map per channel
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99999


def test_the_file_is_listed_and_what_is_no_such_model_is_named(server):
    spec = server.get("/object_info/QARVDLoadDiffusionModel")["QARVDLoadDiffusionModel"]["input"]["required"]["model"]
    assert FILE in (spec[0] if isinstance(spec[0], list) else spec[1]["options"])
    graph = graph_of()
    save_file({"x.weight": torch.zeros(4, 4)}, server.shelf / "unets" / "other.safetensors")
    graph["1"]["inputs"]["model"] = "other.safetensors"
    lines = server.run(graph).error.strip().splitlines()
    assert len(lines) == 2 and lines[0].startswith("other.safetensors cannot be loaded: ")
    assert lines[1].startswith("Choose a model of the Self-Forcing family")
    graph = graph_of()
    graph["2"] = node("QARVDEncodePrompt", pipeline=["1", 0], text=PROMPT)
    lines = server.run(graph).error.strip().splitlines()
    assert "has no text encoder" in lines[0] and "CLIP Text Encode" in lines[1]
    for scheme in ("w8a8_dynamic", "w4a8"):
        graph = {**graph_of(), "12": node("QARVDQuantize", pipeline=["1", 0], scheme=scheme)}
        graph["3"]["inputs"]["pipeline"] = ["12", 0]
        run = server.run(graph)
        if scheme == "w8a8_dynamic":
            assert run.status == "success", run.error
        else:
            lines = run.error.strip().splitlines()
            assert "has no text encoder, which calibration" in lines[0] and "w8a8_dynamic" in lines[1]
