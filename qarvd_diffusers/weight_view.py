"""`DequantizedWeight`: what `QARVDLinear.weight` returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_WRITES = re.compile(
    r"__(i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)|setitem)__|[a-z]\w*[a-z0-9]_"
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

    Adapters ask every layer for shape, dtype and device many times over.
    """

    @staticmethod
    def __new__(cls, layer: nn.Module) -> DequantizedWeight:
        """The weight of a `QARVDLinear`."""
        weight = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.dtype, device=layer.weight_packed.device
        )
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = func == Tensor.data.__set__ or _WRITES.fullmatch(name)
        if writes and args and isinstance(args[0], cls) and func is not Tensor.requires_grad_:
            raise ValueError(
                f"the weight {tuple(args[0].shape)} of a QARVDLinear is packed integers: what is written to its "
                "de-quantized copy (merging or fusing an adapter does that) would be lost. Keep the adapter unmerged, or "
                "merge it into the float model and quantize that."
            )
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FACTS or (name == "__get__" and func not in _VALUES):
                return func(*args, **(kwargs or {}))
            return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight._layer.dequantized(), (args, kwargs or {}))
        return func(*args, **kwargs)
