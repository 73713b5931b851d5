"""Sample with diffusers' UniPC solver, restarted for every chunk of a causal video model."""

from __future__ import annotations

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config

from .scheduling_few_step_renoise import FewStepRenoiseSchedulerOutput, distilled_steps


class ChunkUniPCScheduler(UniPCMultistepScheduler):
    """Apply `UniPCMultistepScheduler` (Zhao et al. 2023, arXiv 2302.04867) for flow matching to a list of timesteps.

    This is the sampler of LongLive 2.0. The solver is of second order, with its corrector. It draws no noise, and the
    last step returns the clean sample. The model gets timesteps truncated to integers, as in diffusers' scheduler.

    Args:
        denoising_timesteps: timesteps of a chunk, falling.
        first_chunk_timesteps: timesteps of generated chunk 0; None takes `denoising_timesteps`.
        warp_timesteps: shift the timesteps by `timestep_shift` before use; else they are the noise levels.
        timestep_shift: shift of the noise levels.
    """

    @register_to_config
    def __init__(
        self,
        denoising_timesteps: tuple[float, ...] = (999, 749.25, 499.5, 249.75),
        first_chunk_timesteps: tuple[float, ...] | None = None,
        warp_timesteps: bool = True,
        timestep_shift: float = 5.0,
    ) -> None:
        shift = timestep_shift if warp_timesteps else 1.0
        super().__init__(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        chunk_index: int = 0,
    ) -> None:
        """Set `timesteps` (int64) and `sigmas` to those of generated chunk `chunk_index`, and forget the last chunk.

        Raises:
            ValueError: if `num_inference_steps` is neither None nor the length of the distilled list.
        """
        steps = distilled_steps(self.config, chunk_index, num_inference_steps)
        super().set_timesteps(sigmas=torch.tensor(steps, dtype=torch.float64).numpy() / 1000, device=device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        noise: None = None,
        return_dict: bool = True,
    ) -> FewStepRenoiseSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Make one step in float32, cast to the dtype of `sample`; see `FewStepRenoiseScheduler.step`. `noise` is
        ignored.
        """
        (moved,) = super().step(model_output.float(), timestep, sample.float(), return_dict=False)
        previous, original = moved.to(sample.dtype), self.model_outputs[-1].to(sample.dtype)
        if not return_dict:
            return previous, original
        return FewStepRenoiseSchedulerOutput(prev_sample=previous, pred_original_sample=original)
