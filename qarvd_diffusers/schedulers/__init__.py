"""Sample autoregressive video diffusion models in few steps."""

from .scheduling_chunk_unipc import ChunkUniPCScheduler
from .scheduling_few_step_renoise import FewStepRenoiseScheduler, FewStepRenoiseSchedulerOutput
from .scheduling_integer_renoise import IntegerRenoiseScheduler

__all__ = [
    "ChunkUniPCScheduler",
    "FewStepRenoiseScheduler",
    "FewStepRenoiseSchedulerOutput",
    "IntegerRenoiseScheduler",
]
