"""Compute a linear layer on packed integer weights, in place of `nn.Linear`: `QARVDLinear`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qarvd_kernels as ops

from ..config import QuantizedModule
from .dequantized_weight import DequantizedWeight
from .qparams import LinearQParams, check_values, dequantized_weight, stored_tensors

logger = logging.getLogger(__name__)


class QARVDLinear(nn.Linear):
    """A frozen linear layer with packed 4- or 8-bit weights, dual scales and (static or dynamic) int8 activations.

    Parameters are those of `LinearQParams`, all without gradient, and `bias`. Conversions such as
    `.to(torch.bfloat16)` or `.half()` change the bias, and so the dtype of the layer, but never the precision of
    scales, codes or zero-points. A subclass of `nn.Linear`, so that adapters (PEFT) and offloading treat it as one;
    gradients flow through to the input as if the layer were the float layer of its dequantized weight
    (straight-through).

    `from_float` builds a complete layer. The constructor leaves the parameters without values, for a loader to fill;
    on the meta device they take no memory.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`.
        description: outlier count, bits and kind of activation.
        dtype: of bias and dequantized weight; None takes torch's default.

    Attributes:
        revision: incremented whenever parameters are assigned, loaded or reordered, but not when they move to a
            device.

    Raises:
        ValueError: an odd number of input channels for 4 bits, or more outliers than channels.
    """

    revision = 0
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter
    channel_order: nn.Parameter
    input_scale: Any  # a parameter with static activations, else None
    input_zero_point: Any
    channel_scale: Any  # a parameter with a scale per token, else None
    _row_order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        description: QuantizedModule,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a float weight
        if description.num_outliers > in_features:
            raise ValueError(f"{description.num_outliers} outlier channels do not fit {in_features} input channels")
        self.in_features, self.out_features = in_features, out_features
        self.num_outliers = description.num_outliers
        self.weight_bits = description.weight_bits
        self.activation, self.rotation = description.activation, description.rotation
        self.group = description.group
        self._dtype = dtype or torch.get_default_dtype()
        # A buffer, and never None, so that whatever moves, keeps or restores the parameters does the same to their
        # order.
        self.register_buffer("_row_order", _natural_order(), persistent=False)
        # Constants of the compiled kernels, or why the layer has none; computed at the first call on a GPU.
        self._prepared: ops.PreparedLinear | str | None = None
        # First, because hosts take the dtype of a module's first (floating-point) parameter for that of the module.
        bias_tensor = _frozen(torch.empty(out_features, dtype=self._dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_tensor)
        for name in ("input_scale", "input_zero_point", "channel_scale"):
            self.register_parameter(name, None)
        for name, (shape, kind) in stored_tensors(in_features, out_features, description).items():
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=kind, device=device)))

    @classmethod
    def empty(cls, *args: Any, **kwargs: Any) -> QARVDLinear:
        """Construct a layer; deprecated name of the constructor, removed with version 0.3."""
        warnings.warn("QARVDLinear.empty is deprecated: call QARVDLinear(...)", DeprecationWarning, stacklevel=2)
        return cls(*args, **kwargs)

    @classmethod
    def from_float(cls, linear: nn.Linear, qparams: LinearQParams) -> QARVDLinear:
        """Build the quantized counterpart of `linear`, on its device, with its bias and dtype.

        Raises:
            ValueError: a tensor of `qparams` is missing or has the wrong shape or dtype, or values that no calibration
                gives (see `qparams.check_values`).
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            qparams.description,
            device="meta",
            dtype=linear.weight.dtype,
        )
        tensors, device = qparams.tensors(), linear.weight.device
        for name, (shape, kind) in stored_tensors(
            linear.in_features, linear.out_features, qparams.description
        ).items():
            tensor = tensors.pop(name, None)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != kind:
                got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{name} is {got}, expected {kind} {shape}")
            setattr(layer, name, _frozen(tensor.detach().to(device, copy=True)))  # tied layers share theirs
        if tensors:
            raise ValueError(f"{sorted(tensors)} have no place in a layer with {qparams.description}")
        if linear.bias is not None:
            layer.bias = _frozen(linear.bias.detach().clone())
        check_values({"": layer}, None)
        return layer.train(linear.training)

    def store_rows_in(self, order: Tensor | None) -> None:
        """Store the output channels in another order; output, `weight` and state dict keep the natural order.

        For kernels that write their output in the channel order of the next layer.

        Args:
            order: int32 `[N]`, the output channel that each stored row belongs to; None goes back to the natural
                order.
        """
        if order is None and not self._is_reordered:
            return
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # in inference mode, parameters would become inference tensors
            if self._is_reordered:
                self._permute_rows(self._row_order.argsort())
            self._row_order = _natural_order() if order is None else order.detach().clone()
            if order is not None:
                self._permute_rows(order)

    @property
    def _is_reordered(self) -> bool:
        """Whether rows are stored in another order than the natural one."""
        return self._row_order.numel() > 0

    def _permute_rows(self, order: Tensor) -> None:
        """Reorder everything that has one entry per output channel."""
        self._forget()
        for name in PER_ROW:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.data = _take(tensor.data, order)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Save the parameters, in natural order."""
        # In place, not as reordered copies: offloading puts what it reads here back into the layer.
        self.store_rows_in(None)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load parameters, which come in natural order."""
        if self._row_order.is_meta:
            self._row_order = _natural_order()  # the parameters are on the meta device, too: nothing to reorder
        self.store_rows_in(None)
        self._forget()
        super()._load_from_state_dict(*args)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Drop what was computed from the parameters; every assignment of a parameter comes through here."""
        self._forget()
        super().register_parameter(name, param)

    def _forget(self) -> None:
        """Give up what was computed from parameters that now change."""
        self._prepared = None
        self.revision += 1

    @property
    def description(self) -> QuantizedModule:
        """Description of this layer in a checkpoint's config."""
        return QuantizedModule(self.num_outliers, self.weight_bits, self.activation, self.rotation, self.group)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bias, and of `weight`."""
        return self._dtype if self.bias is None else self.bias.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight `[N, K]` in original channel order, computed on every use; read-only.

        Merging an adapter writes to the weight of its base layer: written to a copy, the merge would be lost.
        """
        return DequantizedWeight(self)

    def dequantized(self) -> Tensor:
        """Compute the weight as an ordinary tensor `[N, K]`, in original channel order and in the layer's dtype."""
        return self._in_natural_order(self._stored_weight(), 0)

    def _in_natural_order(self, tensor: Tensor, dim: int) -> Tensor:
        """Put stored rows back into natural order along a dimension."""
        return _take(tensor, self._row_order.argsort(), dim) if self._is_reordered else tensor

    def _stored_weight(self) -> Tensor:
        """Dequantize the weight, rows in stored order."""
        return dequantized_weight(self, self.description, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[..., K]` -> `[..., N]` in the dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self)
        return self._in_natural_order(self._compute(x), -1)

    def _compute(self, x: Tensor) -> Tensor:
        """Compute the output, channels in stored order."""
        weight = (self.weight_packed, self.weight_scale, self.weight_zero_point)
        if self.activation == "none":
            return ops.weight_only_linear(
                x, *weight, self.channel_order, self.bias, self.weight_bits, self.num_outliers
            )
        layout = (self.bias, self.weight_bits, self.num_outliers, x.dtype)
        if self.activation == "dynamic":
            codes, scale = ops.quantize_dynamic(x, self.channel_order, self.num_outliers)
            return ops.dual_scale_linear_dynamic(codes, scale, *weight, *layout)
        quantizer, prepared = (self.input_scale, self.input_zero_point), self._prepared_for(x)
        if self.activation == "token":
            codes, scale = ops.quantize_rows(x, self.channel_scale, self.rotation)
            if prepared is None:
                return ops.dual_scale_linear_dynamic(codes, torch.stack([scale, scale], -1), *weight, *layout)
            rows = scale.reshape(-1)
        else:
            codes, rows = ops.quantize_static(x, self.channel_order, self.num_outliers, *quantizer), None
            if prepared is None:
                return ops.dual_scale_linear_static(codes, *weight, *quantizer, *layout)
        product = prepared(codes.reshape(-1, self.in_features), self.weight_packed, x.dtype, row_scale=rows)
        return product.reshape(*x.shape[:-1], self.out_features)

    def _prepared_for(self, x: Tensor) -> ops.PreparedLinear | None:
        """Return the constants of the compiled integer product; None where that does not run.

        Preparing reads tensor values, which tracing cannot: a layer compiled before its first call runs without them.
        """
        if x.dtype == torch.float64 or not self._kernels_run(x.device):
            return None
        prepared = self._prepared
        if isinstance(prepared, ops.PreparedLinear) and prepared.device != x.device:
            prepared = None
        if prepared is None and not torch.compiler.is_compiling():
            prepared = self._prepared = self._prepare()
        return prepared if isinstance(prepared, ops.PreparedLinear) else None

    @staticmethod
    def _kernels_run(device: torch.device) -> bool:
        return device.type == "cuda" and ops.accelerated(device)

    def _prepare(self) -> ops.PreparedLinear | str:
        weight = (self.weight_packed, self.weight_scale, self.weight_zero_point)
        quantizer = (self.input_scale, self.input_zero_point)
        try:
            return ops.prepare_linear(*weight, *quantizer, self.bias, self.weight_bits, self.num_outliers)
        except ops.LayerRefused as error:
            logger.info("a layer %s stays on the unprepared operators: %s", tuple(self.weight_packed.shape), error)
            return str(error)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QARVDLinear:
        # Module.to(dtype), half() and layerwise casting all come through here, and would cast the scales.
        self._prepared = None

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        if self.bias is None:
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return super()._apply(keep_dtype, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> QARVDLinear:
        """Raise an error for True: packed integers cannot be trained."""
        if requires_grad:
            raise ValueError(
                "QARVDLinear is frozen: its packed integer weights take no gradient. Train an adapter on it (LoRA), "
                "or the float model."
            )
        return super().requires_grad_(False)

    def reset_parameters(self) -> None:
        """Raise an error: there is no random initialization."""
        raise RuntimeError("QARVDLinear has no random initialization: load it, or build it with from_float")

    def extra_repr(self) -> str:
        """Describe the layer for `repr`."""
        kinds = {"static": "int8 static", "dynamic": "int8 dynamic", "none": "float", "token": "int8 per token"}
        activation = kinds[self.activation] + (f", rotation={self.rotation}" if self.rotation > 1 else "")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_bits={self.weight_bits}, activation={activation}, num_outliers={self.num_outliers}"
        )


# Parameters with one entry per output channel.
PER_ROW = ("weight_packed", "weight_scale", "weight_zero_point", "bias")


def _natural_order() -> Tensor:
    """Stand for "not reordered", with a tensor that is real even where all else is built on the meta device."""
    return torch.empty(0, dtype=torch.int32, device="cpu")


def _take(tensor: Tensor, order: Tensor, dim: int = 0) -> Tensor:
    """Reorder a tensor; offloading may have moved `order` to another device."""
    return tensor.index_select(dim, order.to(tensor.device))


class _StraightThrough(torch.autograd.Function):
    """Forward of the quantized layer, backward of the float layer of its dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QARVDLinear) -> Tensor:
        """Compute the output of the quantized layer."""
        ctx.layer = layer
        return layer._in_natural_order(layer._compute(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient of the input, as for the float layer."""
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


def _frozen(tensor: Tensor) -> nn.Parameter:
    """Make a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)
