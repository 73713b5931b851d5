"""Shared fixtures: golden data, and a tiny random pipeline of real classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qarvd_diffusers.conversion import load_transformer_config, to_diffusers_keys
from qarvd_diffusers.models import CausalWanTransformer3DModel

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
        pytest.skip(f"no golden data at {folder}; set {variable}")
    return folder


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(golden_folder("QARVD_GOLDEN_DIR", DATA), "A_state_dict_generator_ema.safetensors")


@pytest.fixture(scope="session")
def golden_family():
    def member(name: str) -> Golden:
        return Golden(golden_folder("QARVD_GOLDEN_FAMILY_DIR", DATA / "family", name), "state_dict.safetensors")

    return member


@pytest.fixture(autouse=True)
def two_threads():
    """Small tensors on many threads are slower, and tests run beside other work."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
