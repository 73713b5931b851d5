"""Predict the clean sample and re-noise it, at timesteps truncated to integers: the sampler of LingBot-World."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_few_step_renoise import FewStepRenoiseScheduler


class IntegerRenoiseScheduler(FewStepRenoiseScheduler):
    """Sample as `FewStepRenoiseScheduler`, over the noise table of diffusers' multistep solvers for flow matching.

    The table begins at noise level `1 - 1 / num_train_timesteps`, before the shift, and its timesteps are truncated to
    integers, so that neighbouring entries share one. A timestep stands for two noise levels then, as in diffusers'
    `index_for_timestep`: predictions take the first entry with it, re-noising takes the second, if there is one.

    Args:
        denoising_timesteps: see `FewStepRenoiseScheduler`.
        first_chunk_timesteps: likewise.
        warp_timesteps: likewise (shift 10: 1000, 750, 500, 250 -> 999, 967, 908, 768).
        timestep_shift: likewise.
        num_train_timesteps: likewise.
    """

    @register_to_config
    def __init__(
        self,
        denoising_timesteps: tuple[float, ...] = (1000, 750, 500, 250),
        first_chunk_timesteps: tuple[float, ...] | None = None,
        warp_timesteps: bool = True,
        timestep_shift: float = 10.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        first = torch.tensor(1 - 1 / num_train_timesteps, dtype=torch.float32).item()
        linear = torch.linspace(first, 0, num_train_timesteps + 1, dtype=torch.float64)[:-1]
        sigmas = timestep_shift * linear / (1 + (timestep_shift - 1) * linear)
        self._sigma_table = sigmas.float()
        self._timestep_table = (num_train_timesteps * sigmas).floor().float()
        shared = self._timestep_table[1:] == self._timestep_table[:-1]
        self._renoise_table = self._sigma_table.clone()
        self._renoise_table[:-1] = torch.where(shared, self._sigma_table[1:], self._sigma_table[:-1])
        self.init_noise_sigma = 1.0
        self.set_timesteps()
