"""Few-step schedulers of autoregressive video diffusion models."""

from .scheduling_few_step_renoise import FewStepRenoiseScheduler, FewStepRenoiseSchedulerOutput

__all__ = ["FewStepRenoiseScheduler", "FewStepRenoiseSchedulerOutput"]
