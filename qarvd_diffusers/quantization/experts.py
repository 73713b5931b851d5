"""Stand for a tensor of stacked experts, `[E, K, N]` or `[E, N, K]`, by one quantized Linear an expert.

The stock class goes on using the tensor: it takes the weight of an expert and multiplies by it, or multiplies by all
in one grouped product. torch hands these calls to the objects here (`__torch_function__`), which run the quantized
Linears. Whatever else is done with the tensor is done with its dequantized values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schemes import NEW_FORMAT
from .linear import QARVDLinear

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_GROUPED = getattr(torch, "_grouped_mm", None)


class QARVDExpert(QARVDLinear):
    """The layer of one expert, whose float weight is `[N, K]`."""

    format = NEW_FORMAT
    transposed = False


class QARVDTransposedExpert(QARVDExpert):
    """The layer of one expert, whose float weight is `[K, N]`."""

    transposed = True


class QARVDExperts(nn.Module):
    """Hold the layers of all experts under their numbers, and act as their stacked tensor in products.

    Args:
        layers: of the experts, in order: `QARVDExpert`, or float ones with the same attributes.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
            self.transposed = layer.transposed

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return _Weight(self._modules[str(range(len(self))[int(index)])], self.transposed)
        return self.to_float()[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(Tensor, name) or name.startswith("_"):
                raise
        first: Any = self._modules["0"]
        if name == "device":
            return first.weight.device
        size = (first.in_features, first.out_features) if self.transposed else (first.out_features, first.in_features)
        described = torch.empty(len(self), *size, dtype=first.weight.dtype, device="meta")
        return getattr(described if name in ("shape", "dtype", "ndim", "dim", "size") else self.to_float(), name)

    def to_float(self) -> nn.Parameter:
        """Build the stacked tensor of the dequantized weights."""
        return nn.Parameter(torch.stack([weight.values() for weight in self]), requires_grad=False)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        experts, kwargs = args[1] if len(args) > 1 else None, kwargs or {}
        if isinstance(experts, cls) and experts.transposed:
            if func in (torch.bmm, Tensor.bmm):
                return torch.stack([x @ weight for x, weight in zip(args[0], experts, strict=True)])
            if func is _GROUPED and kwargs.get("offs") is not None and kwargs["bias"] is None:
                return experts._grouped(args[0], kwargs["offs"])
        return _with_values(func, args, kwargs)

    def _grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply rows `[rows, K]`, sorted by expert, those of an expert ending before its entry of `ends`."""
        bounds = [0, *ends.tolist()]
        parts = [x[a:b] @ weight for a, b, weight in zip(bounds, bounds[1:], self, strict=False) if b > a]
        parts.append(x.new_zeros(len(x) - bounds[-1], self.shape[2 if self.transposed else 1]))
        return torch.cat(parts)


class _Weight:
    """Act as the weight of one expert: products by it are those of its layer, adapters included."""

    def __init__(self, layer: Any, transposed: bool) -> None:
        self._layer, self._transposed = layer, transposed

    def values(self) -> Tensor:
        """Compute the dequantized weight, as it lies in the stacked tensor."""
        weight = getattr(self._layer, "base_layer", self._layer).dequantized()
        return weight.T if self._transposed else weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, cls) and isinstance(args[0], Tensor):
            if weight._transposed and func in _PRODUCTS:
                return weight._layer(args[0])
            if not weight._transposed and func is F.linear:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return weight._layer(args[0]) if bias is None else weight._layer(args[0]) + bias
        return _with_values(func, args, kwargs)


def _with_values(func: Callable, args: Any, kwargs: dict[str, Any] | None) -> Any:
    """Call a function with dequantized tensors in place of those that stand for them."""

    def values(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(values, x))
        if isinstance(x, QARVDExperts | _Weight):
            return x.to_float() if isinstance(x, QARVDExperts) else x.values()
        return x

    return func(*values(args), **{name: values(value) for name, value in (kwargs or {}).items()})
