"""Runs inside ComfyUI, started by `test_patchers`: its own model patchers around our layers; prints what they did as JSON.

python patcher_trial.py COMFYUI
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

TREE, ROOT = Path(sys.argv[1]), Path(__file__).resolve().parents[2]
sys.argv = ["main.py", "--cpu"]
sys.path[:0] = [str(TREE), str(ROOT)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

from comfyui_nodes.compat import NodeError  # noqa: E402
from comfyui_nodes.handles import PipelineHandle  # noqa: E402
from qarvd_diffusers import ARVDPipeline, QARVDConfig, bundled_model_path  # noqa: E402
from qarvd_diffusers.quantization.install import dequantize  # noqa: E402

LAYER = "diffusion_model.blocks.2.ffn.0"
META = torch.device("meta")


def message(work: Any, *args: Any, **options: Any) -> str:
    """The node error that `work` ends with."""
    try:
        work(*args, **options)
    except NodeError as error:
        return str(error)
    return ""


def places(module: torch.nn.Module) -> list[str]:
    return sorted({str(tensor.device) for tensor in (*module.parameters(), *module.buffers())})


def lora(seed: int, **more: Any) -> dict[str, torch.Tensor]:
    """A LoRA file's content for one layer of 256 inputs and 576 outputs."""
    g = torch.Generator().manual_seed(seed)
    down, up = 0.1 * torch.randn(4, 256, generator=g), 0.1 * torch.randn(576, 4, generator=g)
    file = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(6.0)}
    if "dora" in more:
        file["dora_scale"] = 0.5 + torch.rand(576, 1, generator=g)
    if "bias" in more:
        file["diff_b"] = torch.randn(576, generator=g)
    return {f"{LAYER}.{name}": tensor for name, tensor in file.items()}


def with_lora(patcher: Any, *files: tuple[dict, float]) -> Any:
    """What Load LoRA nodes behind one another make."""
    for file, strength in files:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)
    return patcher


def scaled(patcher: Any) -> Any:
    """A LoRA whose patch scales the weight, too."""
    once, clone = with_lora(patcher, (lora(4), 0.7)), patcher.clone()
    clone.add_patches({f"{LAYER}.weight": once.patches[f"{LAYER}.weight"][0][1]}, 0.7, 0.5)
    return clone


def merged(patcher: Any, other: Any) -> Any:
    """What Model Merge Simple makes at 0.25."""
    clone = patcher.clone()
    for key, value in other.get_key_patches("diffusion_model.").items():
        clone.add_patches({key: value}, 0.75, 0.25)
    return clone


def effect(patcher: Any, base: Any) -> tuple[float, float]:
    """Largest error of what patches change in the layer's output, against its de-quantized weight, and the change."""
    layer = patcher.model.get_submodule(LAYER)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(9))
    management.load_models_gpu([base])
    weight, bias, plain = layer.dequantized().float(), layer.bias.detach().float().clone(), layer(x)
    management.load_models_gpu([patcher])
    truth = torch.zeros(8, 576)
    for name, value in (("weight", weight), ("bias", bias)):
        patches = patcher.patches.get(f"{LAYER}.{name}", [])
        change = comfy.lora.calculate_weight(patches, value.clone(), f"{LAYER}.{name}") - value
        truth = truth + (x @ change.T if name == "weight" else change)
    got = layer(x) - plain
    return float((got - truth).abs().max()), float(truth.abs().max())


def patched_layers(kind: str, handle: PipelineHandle, other: PipelineHandle) -> dict[str, Any]:
    base, second = model_of(handle, kind), model_of(other, kind)
    cases = {
        "one": with_lora(base, (lora(1), 0.8)),
        "negative": with_lora(base, (lora(1), -1.3)),
        "several": with_lora(base, (lora(1), 0.8), (lora(2), 0.5), (lora(3), 1.1)),
        "scaled": scaled(base),
        "dora": with_lora(base, (lora(5, dora=1), 0.9), (lora(2), 0.5)),
        "bias": with_lora(base, (lora(6, bias=1), 0.9)),
        "merged": merged(base, second),
        "one again": with_lora(base, (lora(1), 0.8)),
    }
    found: dict[str, Any] = {"class": type(base).__name__}
    found["effects"] = {name: effect(patcher, base) for name, patcher in cases.items()}
    management.load_models_gpu([cases["several"]])
    kept = [(key, value.weight) for key, value in cases["several"].backup.items()]
    layers = {name for name, module in base.model.named_modules() if hasattr(module, "weight_packed")}
    found["float backups"] = [key for key, _ in kept if key.rpartition(".")[0] in layers and key.endswith(".weight")]
    found["bytes"] = base.model_size()
    stored = [*base.model.parameters(), *(b for _, b in base.model.named_buffers())]
    found["own bytes"] = sum(tensor.nbytes for tensor in stored)
    management.unload_all_models()
    found["left after unloading"] = sum(getattr(module, "_lora", None) is not None for module in base.model.modules())
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = message(comfy.sd.save_checkpoint, f"{folder}/x.safetensors", base)
        found["saved"] = [path.name for path in Path(folder).iterdir()]
    return found


class HostBuffer:
    """In place of pinned memory, which needs a GPU."""

    size = 0

    def __init__(self, *_: Any) -> None: ...

    def truncate(self, *_: Any, **__: Any) -> None: ...


def model_of(handle: PipelineHandle, kind: str) -> Any:
    from comfyui_nodes.core_model import to_model

    if kind == "static":
        return to_model(handle)
    with (
        patch.object(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic),
        patch.object(management, "is_device_cpu", lambda device: False),
    ):
        return to_model(handle)


def whole_model(handle: PipelineHandle, float_handle: PipelineHandle) -> float:
    """Relative difference between the quantized model and its de-quantized one, each with the same LoRA."""
    g, config = torch.Generator().manual_seed(3), handle.pipe.transformer.config
    latents, text = (
        torch.randn(1, config.in_channels, 3, 8, 8, generator=g),
        torch.randn(1, 16, config.text_dim, generator=g),
    )
    flows = []
    for each in (handle, float_handle):
        patcher = with_lora(model_of(each, "static"), (lora(1), 0.8), (lora(2), 0.5))
        management.load_models_gpu([patcher])
        with torch.no_grad():
            flows.append(patcher.model.diffusion_model(latents, torch.tensor([500.0]), text))
    return float((flows[0] - flows[1]).norm() / flows[1].norm())


def part_loading(handle: PipelineHandle) -> dict[str, Any]:
    """The static patcher with less room than the model takes; the meta device stands for a GPU."""
    patcher = model_of(handle, "static")
    patcher.load_device = META
    patcher.partially_load(META, patcher.model_size() // 2)
    layers = [module for module in patcher.model.modules() if hasattr(module, "weight_packed")]
    left = next(layer for layer in layers if layer.weight_packed.device.type == "cpu")
    x = torch.zeros(2, left.in_features)
    there, here = left(x.to("meta")), left(x)
    return {
        "on the device": sum(layer.weight_packed.is_meta for layer in layers),
        "elsewhere": sum(not layer.weight_packed.is_meta for layer in layers),
        "computed": [str(there.device), str(here.device)],
        "then": places(left),
    }


def whole_loading(handle: PipelineHandle) -> dict[str, Any]:
    """Our own patcher of a pipeline's VAE, with half the room that it takes."""
    patcher = PipelineHandle(handle.pipe, "tiny w8a16")._parts["vae"]
    patcher.load_device = META
    found = {"name": type(patcher.model).__name__, "dynamic": getattr(patcher, "is_dynamic", lambda: False)()}
    with torch.inference_mode():  # as in ComfyUI's own nodes
        patcher.partially_load(META, patcher.model_size() // 2)
    found["loaded"] = places(patcher.model)
    found["inference tensors"] = sum(parameter.is_inference() for parameter in patcher.model.parameters())
    found["given back in part"] = patcher.partially_unload(torch.device("cpu"), 1000)
    found["still loaded"] = places(patcher.model)
    return found


def too_large(handle: PipelineHandle) -> list[str]:
    """Refusals on a device of 1 MB, and on one that runs out on the way."""

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        patch.object(management, "is_device_cpu", lambda device: False),
        patch.object(management, "get_total_memory", lambda device: 1e6),
    ):
        small = message(handle.load, "transformer", "vae")
    with patch.object(management, "load_models_gpu", run_out):
        return [small, message(handle.load, "vae")]


def streamed_text_encoder(handle: PipelineHandle) -> dict[str, Any]:
    """A text encoder on a device that has no room for it."""
    prompt = "a large red circle moving left"
    want = handle.pipe.encode_prompt(prompt, device="cpu")
    sibling = handle.with_transformer(handle.pipe.transformer, "sibling")
    with (
        patch.object(management, "is_device_cpu", lambda device: False),
        patch.object(management, "get_total_memory", lambda device: 1e5),
    ):
        for each in (handle, sibling, handle):
            each.load("text_encoder")
    got = handle.pipe.encode_prompt(prompt, device="cpu")
    return {"offload": handle.pipe.text_encoder_offload, "difference": float((got - want).abs().max())}


def main() -> None:
    missing = [name for name in ("ModelPatcherDynamic",) if not hasattr(comfy.model_patcher, name)]
    missing += ["causal Wan model"] if importlib.util.find_spec("comfy.ldm.wan.ar_model") is None else []
    pipes = [ARVDPipeline.from_pretrained(bundled_model_path()) for _ in range(3)]
    pipes[0].quantize(QARVDConfig("w8a16"))
    pipes[1].quantize(QARVDConfig("w8a16", outlier_detector="none"))
    handle, other, flat = (
        PipelineHandle(pipe, name) for pipe, name in zip(pipes, ("tiny", "other", "flat"), strict=True)
    )
    report: dict[str, Any] = {"missing": missing, "refused": too_large(handle)}
    if not missing:
        with patch("comfy_aimdo.host_buffer.HostBuffer", HostBuffer):
            report |= {kind: patched_layers(kind, handle, other) for kind in ("static", "dynamic")}
        flat.pipe.transformer = copy.deepcopy(handle.pipe.transformer)
        dequantize(flat.pipe.transformer)
        report["whole model"] = whole_model(handle, flat)
        report["part"] = part_loading(handle)
    report["whole"] = whole_loading(other)
    report["text encoder"] = streamed_text_encoder(other)
    print(json.dumps(report))


main()
