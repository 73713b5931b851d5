"""Quantize the video transformers of diffusers and write the table of `docs/supported_models.md`.

Models are tiny and random, with fixed seeds (`tests/stock_models.py`); shares are those of the released size, built on
the meta device. Errors are relative: |quantized - float| / |float| of the output, over four timesteps of two videos
that calibration did not see, and of some that it saw.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

import qarvd_diffusers
from qarvd_diffusers import QARVDConfig, quantize, quantized_linears

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from stock_models import STOCK_MODELS, StockModel, aligned, relative_error  # noqa: E402

TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
CHUNKS, VIDEOS, HELD_OUT, SEEN = 2, 8, (100, 101), (0, 5, 10, 15)
DATA_FREE = ("w8a8_dynamic", "w8a16", "w4a16")
CALIBRATED = ("w8a8", "w4a8", "w4a16")
BEGIN, END = "<!-- table of benchmarks/third_party.py -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Row:
    """What was found for one class: one cell per column."""

    name: str
    cells: dict[str, str]


def rollouts(stock: StockModel, model: nn.Module) -> list[Callable[[], None]]:
    """Make `VIDEOS` rollouts of `CHUNKS` chunks."""

    def rollout(video: int) -> None:
        for chunk in range(CHUNKS):
            for timestep in TIMESTEPS:
                stock.run(model, timestep, seed=video * CHUNKS + chunk)

    return [lambda video=video: rollout(video) for video in range(VIDEOS)]


def passes(stock: StockModel, model: nn.Module, seeds: tuple[int, ...] = HELD_OUT) -> Tensor:
    """Run passes of some videos, by default of those that calibration has not seen, `[N]`."""
    return torch.cat([stock.run(model, timestep, seed) for seed in seeds for timestep in TIMESTEPS])


def shares(stock: StockModel, quantized: set[str]) -> tuple[float, float]:
    """Compute the quantized share of the parameters of the released size: of those in repeated blocks, and of all.

    Args:
        stock: the class.
        quantized: names of the parameters that are quantized in the tiny model; the released one has more blocks, but
            none of another kind.
    """
    model = stock.build_released()
    lists = [f"{name}." for name, module in model.named_modules() if is_repeated(module)]
    kinds = {repeated(name) for name in quantized}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done = {name: size for name, size in sizes.items() if repeated(name) in kinds}
    blocks = [name for name in sizes if name.startswith(tuple(lists))]
    return sum(done.get(name, 0) for name in blocks) / sum(sizes[name] for name in blocks), sum(done.values()) / sum(
        sizes.values()
    )


def is_repeated(module: nn.Module) -> bool:
    """Tell whether a module is a list of blocks of one class."""
    return isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1


def repeated(name: str) -> str:
    """Replace the numbers in a name."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def adapters_work(stock: StockModel, model: nn.Module) -> bool:
    """Add a LoRA adapter to every quantized Linear, and remove it again."""
    if not hasattr(model, "add_adapter"):
        return False
    before = stock.run(model)
    names = list(quantized_linears(model))
    model.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False), "some")
    changed = not torch.equal(stock.run(model), before)
    model.delete_adapters("some")
    return changed and torch.equal(stock.run(model), before)


def offloads(stock: StockModel, model: nn.Module) -> bool:
    """Offload every layer, here from CPU to CPU."""
    before = stock.run(model)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return torch.equal(stock.run(model), before)


def reloads(stock: StockModel, model: nn.Module, folder: Path) -> bool:
    """Save and load with the stock class, bit for bit."""
    model.save_pretrained(folder)
    return torch.equal(stock.run(aligned(stock.cls.from_pretrained(folder))), stock.run(model))


def keeps_dtype(stock: StockModel, folder: Path) -> bool:
    """Tell whether a bfloat16 model has the same dtype quantized as it has in float."""
    config = QARVDConfig("w8a8_dynamic")
    models = [
        stock.cls.from_pretrained(folder, torch_dtype=torch.bfloat16, quantization_config=c) for c in (None, config)
    ]
    return models[0].dtype == models[1].dtype


def dequantizes(stock: StockModel, folder: Path) -> bool:
    """Turn an 8-bit model with float activations into a float one that computes the same but for rounding."""
    model = load(stock, folder, "w8a16")
    before = stock.run(model)
    model.dequantize()
    return not quantized_linears(model) and relative_error(stock.run(model), before) < 1e-5


def load(stock: StockModel, folder: Path, scheme: str) -> nn.Module:
    return aligned(stock.cls.from_pretrained(folder, quantization_config=QARVDConfig(scheme)))


def measure(stock: StockModel, folder: Path) -> Row:
    """Fill the cells of one class."""
    model = stock.build()
    floats = {name for name, _ in model.named_parameters()}
    model.save_pretrained(folder / "float")
    expected, seen = passes(stock, model), passes(stock, model, SEEN)
    cells = {}
    errors = [relative_error(passes(stock, load(stock, folder / "float", s)), expected) for s in DATA_FREE]
    cells["data free"] = _numbers(errors)
    errors, on_seen, bits = [], [], []
    for scheme in CALIBRATED:
        model = stock.build()
        quantize(model, rollouts(stock, model), QARVDConfig(scheme))
        errors.append(relative_error(passes(stock, model), expected))
        on_seen.append(relative_error(passes(stock, model, SEEN), seen))
        bits.append(reloads(stock, model, folder / scheme))
    cells["calibrated"], cells["on its videos"] = _numbers(errors), _numbers(on_seen)
    cells["reload"] = _mark(all(bits))
    cells["dtype"] = _mark(keeps_dtype(stock, folder / "float"))
    quantized = floats - {name for name, p in model.named_parameters() if p.is_floating_point() and name in floats}
    cells["share"] = " / ".join(f"{share:.3f}" for share in shares(stock, quantized))
    cells["LoRA"] = _mark(adapters_work(stock, model))
    cells["offload"] = _mark(offloads(stock, model))
    cells["dequantize"] = _mark(dequantizes(stock, folder / "float"))
    return Row(stock.name, cells)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}".lstrip("0") for value in values)


def _mark(works: bool) -> str:
    return "Y" if works else "P"


def table(rows: list[Row]) -> Iterator[str]:
    """Write the lines of the table."""
    columns = list(rows[0].cells)
    yield "| class | " + " | ".join(columns) + " |"
    yield "|" + "---|" * (len(columns) + 1)
    for row in rows:
        yield f"| `{row.name}` | " + " | ".join(row.cells[column] for column in columns) + " |"


def write(path: Path, lines: list[str]) -> None:
    """Replace what stands between the two markers of a page."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the name of the classes to measure")
    parser.add_argument("--page", type=Path, help="page whose table is replaced; None prints it")
    args = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for stock in (stock for stock in STOCK_MODELS if args.only in stock.name):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(stock, Path(folder)))
        print(rows[-1], flush=True)
    versions: dict[str, Any] = {"qarvd-diffusers": qarvd_diffusers.__version__, "diffusers": diffusers.__version__}
    versions["torch"] = torch.__version__
    stamp = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"Made on {datetime.date.today()} with {stamp}, on a CPU.", "", *table(rows)]
    if args.page is None:
        print("\n".join(lines))
    else:
        write(args.page, lines)


if __name__ == "__main__":
    main()
