"""Shared fixtures: golden data, and a tiny random pipeline of real classes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import build_pipeline

from qarvd_diffusers.conversion import load_transformer_config, to_diffusers_keys
from qarvd_diffusers.models import CausalWanTransformer3DModel
from qarvd_diffusers.pipelines.pipeline_arvd import ARVDPipeline

DATA = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Golden:
    """One folder of golden data. Files hold `[B, F, C, H, W]`; everything handed out is `[B, C, F, H, W]`."""

    folder: Path
    state_dict_name: str

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.exists():
            pytest.skip(
                f"{name} is not in {self.folder}; set QARVD_GOLDEN_DIR / QARVD_GOLDEN_FAMILY_DIR to a full set"
            )
        return load_file(path)

    def file(self, name: str) -> dict[str, torch.Tensor]:
        channels_first = ("patch_embedding_conv_out",)  # stored channels first already
        return {
            key: value.transpose(1, 2) if value.ndim == 5 and key not in channels_first else value
            for key, value in self.stored(name).items()
        }

    def original_config(self) -> dict:
        return json.loads((self.folder / "transformer_config.json").read_text())

    def config(self) -> dict:
        return load_transformer_config(self.folder / "transformer_config.json")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.stored(self.state_dict_name)

    def transformer(self) -> CausalWanTransformer3DModel:
        model = CausalWanTransformer3DModel(**self.config())
        model.load_state_dict(to_diffusers_keys(self.state_dict()), strict=True)
        return model.eval()


def golden_folder(variable: str, default: Path, member: str = "") -> Path:
    folder = Path(os.environ.get(variable, default)) / member
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}; set {variable} to the full set")
    return folder


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(golden_folder("QARVD_GOLDEN_DIR", DATA), "A_state_dict_generator_ema.safetensors")


@pytest.fixture(scope="session")
def golden_family():
    def member(name: str) -> Golden:
        return Golden(golden_folder("QARVD_GOLDEN_FAMILY_DIR", DATA / "family", name), "state_dict.safetensors")

    return member


PARALLEL = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure():
    """Give the processes that a parallel worker starts one thread each: there is one worker per core."""
    if PARALLEL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def few_threads():
    """Use one thread beside other workers, else two: small tensors are slower on many."""
    torch.set_num_threads(1 if PARALLEL else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def needs_gpu(request):
    """Skip what is marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def tiny_pipeline() -> ARVDPipeline:
    """A pipeline with random weights, see `build_pipeline`."""
    return build_pipeline()
