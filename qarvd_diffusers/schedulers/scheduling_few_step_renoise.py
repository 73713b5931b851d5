"""Predict the clean sample, add fresh noise at the next level, repeat.

This is the sampling rule of distribution-matching distilled video models: CausVid (Yin et al. 2024, arXiv 2412.07772)
and Self-Forcing (Huang et al. 2025, arXiv 2506.08009), over the flow-matching noise table of Wan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


def shifted_noise_table(num_steps: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise levels and timesteps of flow matching, from 1 and 1000 down: two float32 `[num_steps]`."""
    linear = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float32)[:-1]
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    return sigmas, sigmas * 1000


def distilled_steps(
    config: Mapping[str, Any], chunk_index: int, num_inference_steps: int | None = None
) -> Sequence[float]:
    """Return the timesteps of generated chunk `chunk_index`, from a scheduler's config.

    Raises:
        ValueError: if `num_inference_steps` is neither None nor their number.
    """
    first = config["first_chunk_timesteps"]
    steps = first if chunk_index == 0 and first is not None else config["denoising_timesteps"]
    if num_inference_steps not in (None, len(steps)):
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}, but the model is distilled for {len(steps)} steps "
            f"({list(steps)}); change denoising_timesteps instead"
        )
    return steps


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return float64 where the device has it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # MPS has no float64


@dataclass
class FewStepRenoiseSchedulerOutput(BaseOutput):
    """Hold the result of a step.

    Attributes:
        prev_sample: input of the next step (re-noised), or the clean sample after the last step.
        pred_original_sample: the predicted clean sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class FewStepRenoiseScheduler(SchedulerMixin, ConfigMixin):
    """Sample in few steps by prediction and re-noising.

    The noise level of a timestep is the nearest table entry, so timestep 0 has the last level of the table (0.005 at
    shift 5), not 0.

    Args:
        denoising_timesteps: timesteps of a chunk, falling.
        first_chunk_timesteps: timesteps of generated chunk 0; None takes `denoising_timesteps`.
        warp_timesteps: read the timesteps as positions in the unshifted schedule and map them through the noise table
            (shift 5: 1000, 750, 500, 250 -> 1000, 937.5, 833.3, 625). Needs integers.
        timestep_shift: shift of the noise table.
        num_train_timesteps: entries of the noise table.
    """

    order = 1
    _renoise_table: torch.Tensor | None = None  # noise levels for re-noising; None takes those of predictions

    @register_to_config
    def __init__(
        self,
        denoising_timesteps: tuple[float, ...] = (1000, 750, 500, 250),
        first_chunk_timesteps: tuple[float, ...] | None = None,
        warp_timesteps: bool = True,
        timestep_shift: float = 5.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        self._sigma_table, self._timestep_table = shifted_noise_table(num_train_timesteps, timestep_shift)
        self.init_noise_sigma = 1.0
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        chunk_index: int = 0,
    ) -> None:
        """Set `timesteps` (float32) and `sigmas` to those of generated chunk `chunk_index`.

        Raises:
            ValueError: if `num_inference_steps` is neither None nor the length of the distilled list.
        """
        steps = distilled_steps(self.config, chunk_index, num_inference_steps)
        self.timesteps = self._warp(steps).to(device)
        self.sigmas = self._sigma(self.timesteps)
        self.num_inference_steps = len(steps)

    def _warp(self, steps: Sequence[float]) -> torch.Tensor:
        """Return timesteps, float32, mapped through the noise table if the config says so."""
        if not self.config.warp_timesteps:
            return torch.tensor(steps, dtype=torch.float32)
        size = self.config.num_train_timesteps
        if any(step != int(step) or not 0 <= step <= size for step in steps):
            raise ValueError(
                f"denoising timesteps {list(steps)} cannot be warped: expected integers in [0, {size}]; "
                "set warp_timesteps=False for timesteps that are already on the shifted schedule"
            )
        table = torch.cat([self._timestep_table, self._timestep_table.new_zeros(1)])
        return table[[size - int(step) for step in steps]]

    def _sigma(self, timestep: torch.Tensor, levels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the noise level, float32, of the first table entry nearest to each timestep."""
        table = _exact(self._timestep_table.to(timestep.device))
        index = (_exact(timestep)[..., None] - table).abs().argmin(dim=-1)
        return (self._sigma_table if levels is None else levels).to(timestep.device)[index]

    def _sigma_for(
        self, timestep: torch.Tensor | float, sample: torch.Tensor, levels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return noise levels, per sample `[B]` or per frame `[B, F]`, shaped to broadcast over `sample` `[B, C, F, H,
        W]`; `levels` replaces those of the table.
        """
        sigma = self._sigma(torch.as_tensor(timestep), levels)  # on the device of the timestep
        if sigma.ndim == 0 and sigma.device.type == "cpu":
            return sigma  # torch takes a CPU scalar on any device; copying it would wait for the previous pass
        sigma = sigma.to(sample.device)
        if sigma.ndim == 2:
            sigma = sigma[:, None]
        return sigma.reshape(sigma.shape + (1,) * (sample.ndim - sigma.ndim))

    def predict_original(
        self, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean sample, `sample - sigma * flow` in float64, cast to the dtype of `model_output`.

        `timestep` is a number, `[B]`, or `[B, F]` (per frame of `[B, C, F, H, W]`).
        """
        sigma = _exact(self._sigma_for(timestep, sample))
        return (_exact(sample) - sigma * _exact(model_output)).to(model_output.dtype)

    def predict_flow(
        self, original_sample: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor
    ) -> torch.Tensor:
        """Invert `predict_original`: `(sample - original) / sigma` in float64, cast to `original_sample`'s dtype."""
        sigma = _exact(self._sigma_for(timestep, sample))
        return ((_exact(sample) - _exact(original_sample)) / sigma).to(original_sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """Return `(1 - sigma) * original + sigma * noise` in float32, cast to the dtype of `noise`; `timesteps` as
        above.
        """
        sigma = self._sigma_for(timesteps, original_samples, self._renoise_table)
        return ((1 - sigma) * original_samples.float() + sigma * noise.float()).to(noise.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FewStepRenoiseSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Predict the clean sample; re-noise it to the next timestep unless this was the last one.

        Args:
            model_output: flow, shaped as `sample`.
            timestep: one of `timesteps`.
            sample: current noisy sample `[B, ...]`.
            noise: fresh noise, shaped as `sample`; None draws it in float32 from `generator`.
            generator: source of the noise.
            return_dict: return a `FewStepRenoiseSchedulerOutput` instead of a tuple.
        """
        step = self._index_of(timestep)
        original = prev_sample = self.predict_original(model_output, self.timesteps[step], sample)
        if step + 1 < len(self.timesteps):
            if noise is None:
                noise = randn_tensor(original.shape, generator=generator, device=original.device, dtype=torch.float32)
            prev_sample = self.add_noise(original, noise.to(original.dtype), self.timesteps[step + 1])
        if not return_dict:
            return prev_sample, original
        return FewStepRenoiseSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    def _index_of(self, timestep: torch.Tensor | float) -> int:
        """Return the index of a timestep in `timesteps`; raises ValueError if it is not there exactly once."""
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device).float()).nonzero()
        if matches.numel() != 1:
            raise ValueError(f"timestep {timestep} is not one of the scheduler's timesteps {self.timesteps.tolist()}")
        return int(matches.item())

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Return the sample: flow matching needs no input scaling."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps
