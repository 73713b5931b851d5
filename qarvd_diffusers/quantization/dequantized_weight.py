"""`DequantizedWeight`: what `QARVDLinear.weight` returns."""

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
_FACTS = {
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
    """What `QARVDLinear.weight` returns: a tensor whose values are computed when they are needed, and an error to write to.

    Adapters ask every layer for shape, dtype and device many times over. Detached, made a parameter or deep-copied it is
    a view again, of the same layer or of its copy; moved, cast or cloned it is an ordinary tensor. It cannot be pickled:
    the layer's state dict holds what it is made of.
    """

    @staticmethod
    def __new__(cls, layer: nn.Module) -> DequantizedWeight:
        """The weight of a `QARVDLinear`."""
        weight = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.dtype, device=layer.weight_packed.device
        )
        weight._layer = layer
        return weight

    def detach(self) -> DequantizedWeight:
        """Another view of the same layer's weight."""
        return DequantizedWeight(self._layer)

    def requires_grad_(self, requires_grad: bool = True) -> DequantizedWeight:
        """Refuses True: packed integers cannot be trained."""
        if requires_grad:
            raise ValueError(
                "the weight of a QARVDLinear is frozen: its packed integers take no gradient. Pass requires_grad=False, or "
                "train on weight.clone()."
            )
        return self

    def __copy__(self) -> DequantizedWeight:
        return self.detach()

    def __deepcopy__(self, memo: dict) -> DequantizedWeight:
        twin = DequantizedWeight(copy.deepcopy(self._layer, memo))
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=False)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"the weight {tuple(self.shape)} of a QARVDLinear is computed from packed integers and cannot be pickled: save "
            "the layer's state_dict(), or weight.clone()"
        )

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        written = [(kwargs or {}).get("out")]
        if func == Tensor.data.__set__ or _WRITES.fullmatch(name):
            written.append(args[0] if args else None)
        for weight in tree_leaves(written):
            if isinstance(weight, cls):
                raise ValueError(
                    f"the weight {tuple(weight.shape)} of a QARVDLinear is packed integers: what is written to its "
                    "de-quantized copy (merging or fusing an adapter does that) would be lost. Keep the adapter unmerged, or "
                    "merge it into the float model and quantize that."
                )
        if name == "_has_compatible_shallow_copy_type":
            return False  # Module.to: put the moved weight, an ordinary tensor, in this one's place instead of into it
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FACTS or (name == "__get__" and func not in _VALUES):
                return func(*args, **(kwargs or {}))
            return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight._layer.dequantized(), (args, kwargs or {}))
        return func(*args, **kwargs)
