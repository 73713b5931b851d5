"""Compare recipes of quantization on the bundled model: last-chunk latent error, adherence, calibration time.

    python benchmarks/recipes.py --scheme w4a8 --prompts 16 --seeds 0 1 2 --json runs/recipes.json

All recipes get the same held-out prompts, noise and re-noise, and calibrate on the same other prompts. A seed sets the
calibration prompts and noise, and the held-out ones too unless `--held-out-seed` is given. `--plant 8` scales some
rows of v down and columns of o up by 8 (and likewise norm2 and cross-attention q) before anything else: the model gets
outlier channels but remains the same function.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_json_line, load_bundled
from torch import Tensor, nn

from qarvd_diffusers import ARVDPipeline, QARVDConfig
from qarvd_diffusers.calibration.inputs import InputQuantizer, TokenQuantizer
from qarvd_diffusers.calibration.targets import quantizable_linears
from qarvd_diffusers.evaluation.fidelity import to_uint8
from qarvd_diffusers.evaluation.moving_shapes import held_out_prompts, sample_scene, shows_prompt
from qarvd_diffusers.quantization.install import apply
from qarvd_diffusers.quantization.linear import QARVDLinear
from qarvd_diffusers.rollout.output import Chunk
from qarvd_kernels import quantize_dynamic, rotate

BATCH = 8  # prompts that are generated together
ALIGNMENT = 16  # the bundled model is 256 wide: the default of 128 would call half of all channels outliers


def load(plant: float | None) -> ARVDPipeline:
    """Load the bundled model, with planted outliers if asked for."""
    pipe = load_bundled()
    if plant:
        plant_outliers(pipe.transformer, plant)
    return pipe


@torch.no_grad()
def plant_outliers(transformer: nn.Module, factor: float, share: float = 0.03) -> None:
    """Make some input channels of o and of cross-attention q outliers, without changing the model's function."""
    generator = torch.Generator().manual_seed(0)
    for block in transformer.blocks:
        attention = [(attn.to_v, attn.to_out[0]) for attn in (block.attn1, block.attn2)]
        for before, after in (*attention, (block.norm2, block.attn2.to_q)):
            count = max(1, int(share * after.in_features))
            channels = torch.randperm(after.in_features, generator=generator)[:count]
            before.weight[channels] /= factor
            before.bias[channels] /= factor
            after.weight[:, channels] *= factor


def calibration_prompts(seed: int, count: int = 8) -> tuple[str, ...]:
    """Draw prompts of the training grammar, none of them held out."""
    rng = np.random.default_rng(1000 + seed)
    return tuple(sample_scene(rng, held_out=False).prompt for _ in range(count))


def qarvd(pipe: ARVDPipeline, scheme: str, seed: int, mixed: float = 0, **options) -> None:
    """Quantize with this package, with 8 bits for a share `mixed` of the weights."""
    prompts = calibration_prompts(seed)
    options = {"outlier_alignment": ALIGNMENT, "calibration_seed": 10_000 + seed, **options}
    config = QARVDConfig(scheme, calibration_prompts=prompts, **options)
    config = pipe.choose_bits(config, mixed) if mixed else config
    apply(pipe.transformer, pipe.calibrate(config, use_cache=False))


def smooth_quant(pipe: ARVDPipeline, scheme: str, seed: int) -> None:
    """Move half of each channel's magnitude from activations to weights (arXiv 2211.10438), then round to nearest.

    Inputs are divided at run time here; a deployment would fold the division into the previous layer.
    """
    options = {"rounding": "nearest", "outlier_detector": "none", "chunk_weights": "uniform", "tie_inputs": False}
    linears = quantizable_linears(pipe.transformer, QARVDConfig(scheme))
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            peak = args[0].detach().flatten(0, -2).abs().amax(0)
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)

        return hook

    with hooked({name: watch(name) for name in linears}, pipe.transformer):
        roll_out_latents(pipe, calibration_prompts(seed), 7, 10_000 + seed)
    factors = {}
    for name, linear in linears.items():
        weight = linear.weight.detach().abs().amax(0).clamp_min(1e-5)
        factors[name] = (peaks[name].clamp_min(1e-5) / weight).sqrt()
        linear.weight.data *= factors[name]

    def divide(name: str) -> Callable:
        return lambda module, args: (args[0] / factors[name],)

    divisions = {name: divide(name) for name in linears}
    with hooked(divisions, pipe.transformer):
        qarvd(pipe, scheme, seed, **options)
    for name, division in divisions.items():  # permanently: quantizing replaced the layers
        pipe.transformer.get_submodule(name).register_forward_pre_hook(division)


@contextmanager
def hooked(hooks: Mapping[str, Callable], module: nn.Module) -> Iterator[None]:
    """Attach forward pre-hooks to submodules by name, inside the block."""
    handles = [module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quanto(pipe: ARVDPipeline, scheme: str, seed: int, weights: str) -> None:
    """Quantize the weights of the same layers with optimum-quanto: groups of up to 128 channels at 4 bits."""
    from optimum.quanto import freeze, qtypes, quantize

    for name in quantizable_linears(pipe.transformer, QARVDConfig(scheme)):
        parent, _, child = name.rpartition(".")
        quantize(pipe.transformer.get_submodule(parent), weights=qtypes[weights], include=child)
    freeze(pipe.transformer)


def torchao(pipe: ARVDPipeline, scheme: str, seed: int, kind: str) -> None:
    """Quantize the same layers with torchao: int8 weights and per-token activations, or int4 in groups of 64."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int8 = Int8DynamicActivationInt8WeightConfig() if kind == "int8 dynamic" else None
    names = set(quantizable_linears(pipe.transformer, QARVDConfig(scheme)))
    quantize_(
        pipe.transformer,
        int8 or IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
        filter_fn=lambda module, name: name in names,
    )


PLAIN = {"outlier_detector": "none", "chunk_weights": "uniform"}
RECIPES: dict[str, Callable[[ARVDPipeline, str, int], None]] = {
    "round to nearest": lambda *a: qarvd(*a, rounding="nearest", **PLAIN),
    "round to nearest, dual scale and chunk weights": lambda *a: qarvd(*a, rounding="nearest"),
    "SmoothQuant, round to nearest": smooth_quant,
    "optimum-quanto qint8, weights only": lambda *a: quanto(*a, "qint8"),
    "optimum-quanto qint4, weights only": lambda *a: quanto(*a, "qint4"),
    "torchao int8 weights, int8 dynamic activations": lambda *a: torchao(*a, "int8 dynamic"),
    "torchao int4, weights only": lambda *a: torchao(*a, "int4"),
    "reference (AdaRound)": lambda *a: qarvd(*a, reference_compat=True, outlier_alignment=32),
    "AdaRound, dual scale and chunk weights": lambda *a: qarvd(*a, rounding="adaround"),
    "closed form": lambda *a: qarvd(*a, rounding="gptq", **PLAIN),
    "closed form, chunk weights": lambda *a: qarvd(*a, rounding="gptq", outlier_detector="none"),
    "closed form, dual scale": lambda *a: qarvd(*a, rounding="gptq", chunk_weights="uniform"),
    "closed form, both": lambda *a: qarvd(*a, rounding="gptq"),
    "closed form, both, alignment 128": lambda *a: qarvd(*a, rounding="gptq", outlier_alignment=128),
    "closed form, both, quantized inputs": lambda *a: qarvd(*a, rounding="gptq", rounding_inputs="quantized"),
    "closed form, both, a tenth at 8 bits": lambda *a: qarvd(*a, rounding="gptq", mixed=0.1),
    "split by inputs": lambda *a: qarvd(*a, outlier_detector="input"),
    "split by weights": lambda *a: qarvd(*a, outlier_detector="mad_zscore"),
    "split by weights, clipped inputs": lambda *a: qarvd(
        *a, outlier_detector="mad_zscore", input_percentiles=(0.999, 0.9999, 0.99999)
    ),
    "split by weights, alignment 128": lambda *a: qarvd(*a, outlier_detector="mad_zscore", outlier_alignment=128),
    "split by weights, clipped inputs, alignment 128": lambda *a: qarvd(
        *a, outlier_detector="mad_zscore", input_percentiles=(0.999, 0.9999, 0.99999), outlier_alignment=128
    ),
    "default, alignment 128": lambda *a: qarvd(*a, outlier_alignment=128),
    "scale per token": lambda *a: qarvd(*a, activation="token"),
    "scale per token, alignment 128": lambda *a: qarvd(*a, activation="token", outlier_alignment=128),
    "default": lambda *a: qarvd(*a),
}


class Simulated(nn.Module):
    """Compute a quantized layer in floats: faster than integers on a CPU, equal up to rounding."""

    def __init__(self, layer: QARVDLinear) -> None:
        super().__init__()
        self.bias, weight = layer.bias, layer.dequantized()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.order, self.quantizer = layer.channel_order, None
        if layer.activation == "static":
            self.quantizer = InputQuantizer(layer.input_scale, layer.input_zero_point, layer.num_outliers)
        elif layer.activation == "dynamic":
            self.quantizer = partial(quantized_per_token, num_outliers=layer.num_outliers)
        elif layer.activation == "token":
            self.quantizer = TokenQuantizer()
        self.rotation = layer.rotation
        if self.rotation > 1:
            weight = rotate(weight, self.rotation)
        if self.quantizer is not None:
            weight = weight[:, self.order.long()].contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `[..., K]`."""
        x = rotate(x, self.rotation) if self.rotation > 1 else x
        x = x if self.quantizer is None else self.quantizer(x.index_select(-1, self.order))
        return nn.functional.linear(x, self.weight, self.bias)


def quantized_per_token(x: Tensor, num_outliers: int) -> Tensor:
    """Round permuted channels `[..., K]` to the grids of `w8a8_dynamic`."""
    codes, scale = quantize_dynamic(x, torch.arange(x.shape[-1], dtype=torch.int32), num_outliers)
    parts = codes.float().tensor_split([num_outliers], dim=-1)
    return torch.cat([part * scale[..., g, None] for g, part in enumerate(parts)], dim=-1)


def simulate(transformer: nn.Module) -> None:
    """Replace every quantized layer by its simulation."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, QARVDLinear):
            simulated = Simulated(layer)
            simulated._forward_pre_hooks = layer._forward_pre_hooks
            transformer.set_submodule(name, simulated)


def roll_out(
    pipe: ARVDPipeline, prompts: Sequence[str], num_chunks: int, seed: int, decode: bool
) -> Iterator[list[Chunk]]:
    """Stream the prompts in batches; prompt i draws its noise from seed + i in any batch."""
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))]
        output = "np" if decode else "latent"
        yield list(pipe.stream(batch, num_chunks=num_chunks, generator=generators, output_type=output))


def roll_out_latents(
    pipe: ARVDPipeline, prompts: Sequence[str], num_chunks: int, seed: int, decode: bool = False
) -> tuple[Tensor, float | None]:
    """Generate latents `[prompts, chunks, C, F, H, W]` and, if they are decoded, the adherence."""
    latents, right = [], []
    for chunks in roll_out(pipe, prompts, num_chunks, seed, decode):
        latents.append(torch.stack([chunk.latents for chunk in chunks], dim=1))
        for i in range(len(chunks[0].latents) if decode else 0):
            video = np.concatenate([to_uint8(chunk.frames[i]) for chunk in chunks])
            right.append(shows_prompt(video, prompts[len(right)]))
    return torch.cat(latents), float(np.mean(right)) if decode else None


def main() -> None:
    """Quantize with every recipe and seed, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--held-out-seed", type=int, help="seed of the prompts and noise to judge on (default: that of --seeds)"
    )
    parser.add_argument("--plant", type=float, help="factor of planted outliers")
    parser.add_argument("--adherence", action="store_true", help="also decode and judge the videos")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file to append the figures to, a line per recipe and seed")
    args = parser.parse_args()

    print(
        "| scheme | recipe | seed | last-chunk latent MSE | all chunks | median prompt | adherence | calibration s |\n"
        "|" + "---|" * 8
    )
    for seed in args.seeds:
        noise = seed if args.held_out_seed is None else args.held_out_seed
        prompts = held_out_prompts(args.prompts, noise)
        expected, judged = roll_out_latents(load(args.plant), prompts, args.chunks, noise, args.adherence)
        if args.adherence:
            print(f"float, {args.prompts} prompts of seed {noise}: {judged:.1%} right", flush=True)
        for name in args.recipes:
            pipe = load(args.plant)
            start = time.perf_counter()
            RECIPES[name](pipe, args.scheme, seed)
            row = {"scheme": args.scheme, "recipe": name, "seed": seed, "plant": args.plant, "held_out_seed": noise}
            row["seconds"] = time.perf_counter() - start
            simulate(pipe.transformer)
            got, row["adherence"] = roll_out_latents(pipe, prompts, args.chunks, noise, args.adherence)
            row["latent_mse"] = (got - expected).square().mean(dim=(2, 3, 4, 5)).tolist()  # [prompts][chunks]
            report(row)
            if args.json:
                append_json_line(row, args.json)


def report(row: Mapping[str, Any]) -> None:
    """Print a row of the table."""
    errors = np.array(row["latent_mse"])
    adherence = "" if row["adherence"] is None else f"{row['adherence']:.1%}"
    print(
        f"| {row['scheme']} | {row['recipe']} | {row['seed']} | {errors[:, -1].mean():.5f} | {errors.mean():.5f} | "
        f"{np.median(errors.mean(1)):.5f} | {adherence} | {row['seconds']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
