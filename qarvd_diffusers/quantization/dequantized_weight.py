"""Show the weight of a `QARVDLinear` as a tensor that is computed when its values are needed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_WRITES = re.compile(
    r"__(i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)|setitem)__|_?[a-z]\w*[a-z0-9]_"
)
_METADATA = {
    "size",
    "dim",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "get_device",
    "__len__",
}
_VALUES = [getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")]


class DequantizedWeight(Tensor):
    """Compute values only when they are needed, and raise an error when written to.

    Adapters often read shape, dtype and device of a layer's weight, which costs nothing here. Detached, made a
    parameter or deep-copied it is a view again, of the same layer or of its copy; moved, cast or cloned it is an
    ordinary tensor. It cannot be pickled: save the layer's state dict instead.
    """

    _layer: Any  # the QARVDLinear, whose module imports this one

    @staticmethod
    def __new__(cls, layer: Any) -> DequantizedWeight:
        """View the weight of a `QARVDLinear`."""
        weight = Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=layer.dtype, device=layer.weight_packed.device
        )
        weight._layer = layer
        return weight

    def detach(self) -> DequantizedWeight:
        """Return another view of the same layer's weight."""
        return DequantizedWeight(self._layer)

    def requires_grad_(self, requires_grad: bool = True) -> DequantizedWeight:
        """Raise an error for True: packed integers cannot be trained."""
        if requires_grad:
            raise ValueError(
                "the weight of a QARVDLinear is frozen: its packed integers take no gradient. Pass "
                "requires_grad=False, or train on weight.clone()."
            )
        return self

    def __copy__(self) -> DequantizedWeight:
        return self.detach()

    def __deepcopy__(self, memo: dict) -> DequantizedWeight:
        weight = DequantizedWeight(copy.deepcopy(self._layer, memo))
        memo[id(self)] = nn.Parameter(weight, requires_grad=False) if isinstance(self, nn.Parameter) else weight
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"the weight {tuple(self.shape)} of a QARVDLinear is computed from packed integers and cannot be "
            "pickled: save the layer's state_dict(), or weight.clone()"
        )

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        written = [(kwargs or {}).get("out")]
        if func == Tensor.data.__set__ or _WRITES.fullmatch(name):  # type: ignore[attr-defined]
            written.append(args[0] if args else None)
        for weight in tree_leaves(written):
            if isinstance(weight, cls):
                raise ValueError(
                    f"the weight {tuple(weight.shape)} of a QARVDLinear is packed integers: what is written to its "
                    "dequantized copy (merging or fusing an adapter does that) would be lost. Keep the adapter "
                    "unmerged, or merge it into the float model and quantize that."
                )
        if name == "_has_compatible_shallow_copy_type":
            return False  # so that Module.to replaces this weight instead of writing to it
        with torch._C.DisableTorchFunctionSubclass():
            if name in _METADATA or (name == "__get__" and func not in _VALUES):
                return func(*args, **(kwargs or {}))
            return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight._layer.dequantized(), (args, kwargs or {}))
        return func(*args, **kwargs)
