"""Share one calibration among the processes of `accelerate launch`; a no-op in a single process.

Rollouts that only add to statistics are shared prompt by prompt, rounding is shared layer by layer; accelerate
transfers the results between processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

T = TypeVar("T")

# How long a process waits for the others, whose share may take longer. A process that died is noticed at once.
COLLECTIVE_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """Connect the processes of a job. All of them must call every method except `share`, in the same order.

    Attributes:
        count: how many there are.
        index: of this process; 0 is the main one, which writes files and shows progress.
    """

    count: int = 1
    index: int = 0

    @classmethod
    def launched(cls) -> Processes:
        """Find the processes of this job: those of `accelerate launch` or `torchrun`, else this one alone.

        On GPUs every process gets its own: load the model after this call, or after creating accelerate's
        `PartialState`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return SINGLE_PROCESS  # without accelerate's state, which the caller may want to set up differently
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)
        return cls(state.num_processes, state.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of some items: consecutive ones, in the order of the processes."""
        # accelerate's own split repeats the last item for processes that would get none.
        return list(items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count])

    def gather(self, value: T) -> list[T]:
        """Collect the values of all processes, in order."""
        if self.count == 1:
            return [value]
        with self._together():
            return gather_object([value])

    def from_main(self, value: T) -> T:
        """Return the value of the main process."""
        if self.count == 1:
            return value
        box = [value if self.is_main else None]
        with self._together():
            broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensors of all processes, on the device of this process's tensor."""
        if self.count == 1:
            return tensor
        with self._together():
            return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)

    def require_same(self, value: object, what: str) -> None:
        """Check that all processes pass the same value.

        Raises:
            ValueError: they differ; the message says in `what`.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"the {self.count} processes of this job differ in {what}: all of them must use the same")

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.index} of {self.count} lost another process of this job, whose own message says why. "
                "Start the job again: with a file or folder to resume from, it continues where it stopped"
            ) from error

    def close(self) -> None:
        """Close the connection between the processes; no collective call is possible afterwards."""
        if self.count > 1:
            PartialState().destroy_process_group()


SINGLE_PROCESS = Processes()
