"""List the linear layers of a model's transformer: bits, activations, outlier channels, bytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .common import add_model_argument, resolve_model, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qarvd inspect`."""
    add_model_argument(parser)
    parser.add_argument(
        "--plot", metavar="PNG", help="draw the share of outlier channels per layer (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the transformer and list its layers."""
    import torch
    from diffusers import AutoModel

    from ..evaluation.plots import plot_outliers
    from ..quantization.model import stored_bytes

    model = AutoModel.from_pretrained(resolve_model(args.model), subfolder="transformer", dtype=torch.bfloat16)
    layers = list(_layers(model))
    if args.plot:
        plot_outliers(layers, args.plot)
    return {"model": args.model, "quantization": _quantization(model), "layers": layers, "bytes": stored_bytes(model)}


def _quantization(model: Any) -> dict[str, Any] | None:
    config = model.config.get("quantization_config")
    return None if config is None else {k: v for k, v in config.to_dict().items() if k != "modules"}


def _layers(model: Any) -> Iterator[dict[str, Any]]:
    """Yield one entry per quantizable layer: as stored in a quantized model, as detected in a float one."""
    from ..calibration.outliers import find_outliers
    from ..calibration.targets import quantizable_linears
    from ..config import QARVDConfig
    from ..quantization.model import quantized_linears

    config = QARVDConfig(outlier_detector="mad_zscore")  # the detector that needs no data
    quantized = quantized_linears(model)
    for name, layer in quantized.items():
        yield {
            "name": name,
            "shape": [layer.out_features, layer.in_features],
            "weight_bits": layer.weight_bits,
            "activation": layer.activation,
            "outliers": layer.num_outliers,
            "bytes": sum(p.nbytes for p in layer.parameters()),
        }
    if not quantized:
        for name, layer in quantizable_linears(model, config).items():
            yield {
                "name": name,
                "shape": [layer.out_features, layer.in_features],
                "weight_bits": 8 * layer.weight.element_size(),
                "activation": "float",
                "outliers": find_outliers(
                    [layer.weight], config.outlier_detector, config.outlier_alignment
                ).num_outliers,
                "bytes": layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes),
            }


def render(result: dict[str, Any]) -> str:
    """Format one row per layer and the size of the transformer."""
    rows = [
        (
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["weight_bits"],
            layer["activation"],
            layer["outliers"],
            f"{layer['bytes']:,}",
        )
        for layer in result["layers"]
    ]
    quantization = result["quantization"]
    sizes = result["bytes"]
    return "\n".join(
        [
            f"{result['model']}: {quantization['scheme'] if quantization else 'float'}",
            table(("layer", "shape", "bits", "activations", "outliers", "bytes"), rows),
            f"transformer: {sizes['total']:,} bytes"
            + (f"; quantized layers {sizes['quantized'] / sizes['bfloat16']:.3f} of bfloat16" if quantization else ""),
        ]
    )
