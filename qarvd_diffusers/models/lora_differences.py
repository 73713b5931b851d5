"""What adapters add to parameters that PEFT has no layer for: norms, modulation tables, a convolution.

Such a parameter of a causal Wan transformer is never quantized. It holds its own value plus the scaled difference of every
active adapter, written anew whenever an adapter is set, scaled, disabled or deleted; the value without adapters is kept.
PEFT is imported by this module, which is imported where an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

CHILD = "lora_differences"  # of the transformer: a tree of modules whose leaves are called as the parameters


class DifferenceLayer(nn.Module, BaseTunerLayer):
    """The differences of one parameter, by adapter. PEFT and diffusers treat it like any layer with adapters.

    Attributes:
        lora_difference: adapter -> tensor of the parameter's shape.
        base: the parameter's value without adapters; a buffer that is not stored.
    """

    adapter_layer_names = ("lora_difference",)
    other_param_names = ("r", "lora_alpha", "scaling", "use_rslora")

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._where = (owner, name)  # in a tuple, so that the owner does not become a child
        self.lora_difference = nn.ParameterDict()
        self.r, self.lora_alpha, self.scaling, self.use_rslora = {}, {}, {}, {}
        self.merged_adapters = []
        self.register_buffer("base", None, persistent=False)

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(*self._where)

    @property
    def weight(self) -> Tensor:
        """What PEFT asks for device and dtype."""
        return self.parameter

    @property
    def bias(self) -> None:
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: a difference is added where its parameter lies, and keeps its dtype."""

    def add(self, adapter: str, difference: Tensor) -> None:
        """Hold the difference of one more adapter; it counts once the adapter is set."""
        if self.base is None:
            self.base = self.parameter.detach().clone()
        difference = difference.float() if difference.dtype.itemsize == 1 else difference
        difference = difference.reshape(self.base.shape).to(self.base.device)
        self.lora_difference[adapter] = nn.Parameter(difference, requires_grad=False)
        self.r[adapter] = self.lora_alpha[adapter] = 1
        self.scaling[adapter], self.use_rslora[adapter] = 1.0, False

    def write(self) -> None:
        """Make the parameter what the active adapters say."""
        if self.base is None:
            return
        if self.parameter.is_meta:
            raise ValueError(
                f"an adapter adds to {self._where[1]!r} of a {type(self._where[0]).__name__}, which is on the meta device: load, "
                "scale and remove adapters before enable_sequential_cpu_offload()"
            )
        active = [] if self.disable_adapters else self.active_adapters
        active = [name for name in self.scaling if name in active or name in self.merged_adapters]
        value = self.base
        if active:
            value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name in active:
                value += self.scaling[name] * self.lora_difference[name].to(value)
        self.parameter.data.copy_(value)
        if not self.scaling:
            self.base = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT, except that a difference is never trained."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.write()

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        self.write()

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self.write()

    def scale_layer(self, scale: float) -> None:
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] *= scale
        self.write()

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        self.write()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the differences of adapters (None: the active ones) in the parameter, whatever is set afterwards."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [name for name in names if name in self.scaling and name not in self.merged_adapters]
        self.write()

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self.write()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.write()


def difference_layers(transformer: nn.Module) -> Iterator[DifferenceLayer]:
    tree = getattr(transformer, CHILD, None)
    return iter(()) if tree is None else (module for module in tree.modules() if isinstance(module, DifferenceLayer))


def add_differences(transformer: nn.Module, adapter: str, differences: Mapping[str, Tensor]) -> None:
    """Hold what an adapter that PEFT has just loaded adds to parameters, and set every difference as PEFT's layers are set.

    Args:
        transformer: has the adapter's factors already.
        adapter: its name; differences that it had before are replaced.
        differences: parameter -> what to add.
    """
    for layer in difference_layers(transformer):
        if adapter in layer.scaling:
            layer.delete_adapter(adapter)
    for name, difference in differences.items():
        _leaf(transformer, name).add(adapter, difference)
    peft = next(
        m for m in transformer.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DifferenceLayer)
    )
    for layer in difference_layers(transformer):
        layer._disable_adapters = peft.disable_adapters
        layer.set_adapter(peft.active_adapters)


def _leaf(transformer: nn.Module, parameter: str) -> DifferenceLayer:
    """The layer of a parameter, made where there is none."""
    module, parts = transformer, [CHILD, *parameter.split(".")]
    for part in parts[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    if parts[-1] not in module._modules:
        owner, _, name = parameter.rpartition(".")
        module.add_module(parts[-1], DifferenceLayer(transformer.get_submodule(owner), name))
    return module._modules[parts[-1]]


def remove_differences(transformer: nn.Module) -> None:
    """Give every parameter its own value back, bit by bit, unless its adapters are merged, and forget all differences."""
    for layer in difference_layers(transformer):
        layer.set_adapter([])
    delattr(transformer, CHILD)
