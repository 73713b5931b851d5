"""`Processes`: what `accelerate launch` started works on one calibration together; a process on its own notices nothing.

Rollouts that only add to statistics are shared prompt by prompt, rounding is shared layer by layer; accelerate moves what
they find from one process to the others.
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

# How long a process waits for the others, whose layers or prompts may take longer; one that died is noticed at once.
PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """The processes of a job. Every method but `share` has to be called by all of them, in the same order.

    Attributes:
        count: how many there are.
        index: which of them this one is; 0 is the main one, which writes files and shows progress.
    """

    count: int = 1
    index: int = 0

    @classmethod
    def launched(cls) -> Processes:
        """Those of this job: more than one under `accelerate launch` or `torchrun`, else this process alone.

        On GPUs every process gets its own: load the model after this call, or after creating accelerate's `PartialState`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE  # and accelerate's state, which the caller may want to set up otherwise, stays untouched
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.num_processes, state.process_index)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of some items: consecutive ones, so that the parts in order of process are the whole."""
        # accelerate's own split hands the last item again to processes that would get none.
        return list(items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.count == 1:
            return [value]
        with self._together():
            return gather_object([value])

    def from_main(self, value: T) -> T:
        """The value of the main process."""
        if self.count == 1:
            return value
        box = [value if self.is_main else None]
        with self._together():
            broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, on the device of this one's."""
        if self.count == 1:
            return tensor
        with self._together():
            return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)

    def require_same(self, value: object, what: str) -> None:
        """Refuse to work together on different things.

        Raises:
            ValueError: the processes pass different values; `what` they are is named.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(
                f"the {self.count} processes of this job differ in {what}: all of them have to do the same"
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.index} of {self.count} lost another process of this job, whose own message says why. Start "
                "the job again: with a file or folder to resume from it goes on where it stopped"
            ) from error

    def close(self) -> None:
        """End the connection between the processes; nothing can be done together afterwards."""
        if self.count > 1:
            PartialState().destroy_process_group()


ALONE = Processes()
