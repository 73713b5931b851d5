"""Few-step schedulers of autoregressive video diffusion models."""

from .scheduling_chunk_unipc import ChunkUniPCScheduler
from .scheduling_few_step_renoise import FewStepRenoiseScheduler, FewStepRenoiseSchedulerOutput

__all__ = ["ChunkUniPCScheduler", "FewStepRenoiseScheduler", "FewStepRenoiseSchedulerOutput"]
