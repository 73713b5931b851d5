"""Let one thread at a time run a model: a pass keeps its state on the model's modules."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType

from torch import nn


class ModelLock:
    """Lock of one model, which the thread that holds it may take again.

    A garbage collector may end a stream in any thread, where waiting could block for ever. `soon` does not wait: what
    it is given is done at once if the lock is free, else by the thread that holds it, when it lets go.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()

    def __enter__(self) -> ModelLock:
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
        self._do_waiting()

    def soon(self, action: Callable[[], None]) -> None:
        """Do something under the lock, in this thread or in another one."""
        self._waiting.append(action)
        self._do_waiting()

    def _do_waiting(self) -> None:
        """Do what waits, unless another thread has the lock: it comes here when it lets go."""
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._lock.release()


_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def model_lock(model: nn.Module) -> ModelLock:
    """Return the lock of a model, the same one for every pipeline that has it; `torch.compile` does not change it."""
    model = getattr(model, "_orig_mod", model)
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, ModelLock())
