"""List the Linears of a model folder's transformer: bits, activations, outlier channels, bytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .common import resolve_model, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or Hub id; `bundled` names the model that ships with the package")
    parser.add_argument(
        "--plot", metavar="PNG", help="draw the share of outlier channels per layer (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from diffusers import AutoModel

    from ..serialization import stored_bytes

    model = AutoModel.from_pretrained(resolve_model(args.model), subfolder="transformer", dtype=torch.bfloat16)
    layers = list(_layers(model))
    if args.plot:
        plot(layers, args.plot)
    return {"model": args.model, "quantization": _quantization(model), "layers": layers, "bytes": stored_bytes(model)}


def _quantization(model: Any) -> dict[str, Any] | None:
    config = model.config.get("quantization_config")
    return None if config is None else {k: v for k, v in config.to_dict().items() if k != "modules"}


def _layers(model: Any) -> Iterator[dict[str, Any]]:
    """One entry per quantizable Linear: as stored in a quantized model, as detected in a float one."""
    from ..calibration.outliers import find_outliers
    from ..calibration.targets import quantizable_linears
    from ..config import QARVDConfig
    from ..serialization import quantized_linears

    config = QARVDConfig(outlier_detector="mad_zscore")  # all that can be said without data
    for name, layer in quantized_linears(model).items():
        yield {
            "name": name,
            "shape": [layer.out_features, layer.in_features],
            "weight_bits": layer.weight_bits,
            "activation": layer.activation,
            "outliers": layer.num_outliers,
            "bytes": sum(p.nbytes for p in layer.parameters()),
        }
    if not quantized_linears(model):
        for name, layer in quantizable_linears(model, config).items():
            yield {
                "name": name,
                "shape": [layer.out_features, layer.in_features],
                "weight_bits": 8 * layer.weight.element_size(),
                "activation": "float",
                "outliers": find_outliers(
                    [layer.weight], config.outlier_detector, config.outlier_alignment
                ).num_outliers,
                "bytes": sum(p.nbytes for p in layer.parameters()),
            }


def plot(layers: list[dict[str, Any]], path: str) -> None:
    """Bar per layer: share of its input channels that are outliers."""
    from ..evaluation.plots import require_matplotlib
    from ..serialization import atomic_file

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.16 * len(layers) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([layer["name"] for layer in layers], [layer["outliers"] / layer["shape"][1] for layer in layers])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("share of input channels that are outliers")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def render(result: dict[str, Any]) -> str:
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
