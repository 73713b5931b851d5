"""Apply what adapters add to parameters that PEFT has no layer for: norms, modulation tables, a convolution.

Such a parameter of a causal Wan transformer is never quantized. It holds its base value plus the scaled difference of
every active adapter, and is rewritten whenever an adapter is set, scaled, disabled or deleted. The base value is kept
beside it. This module imports PEFT, so import it only where an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

CHILD = "lora_differences"  # attribute of the transformer: a tree of modules that mirrors the parameters' names


class DifferenceLayer(nn.Module, BaseTunerLayer):
    """Hold the differences of one parameter, by adapter. PEFT and diffusers treat it like any layer with adapters.

    Attributes:
        lora_difference: adapter -> tensor of the parameter's shape.
        base: the parameter's value without adapters, or None without differences; a buffer that is not saved.
    """

    adapter_layer_names = ("lora_difference",)
    other_param_names = ("r", "lora_alpha", "scaling", "use_rslora")

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._where = (owner, name)  # in a tuple, so that torch does not register the owner as a submodule
        self.lora_difference = nn.ParameterDict()
        self.r, self.lora_alpha, self.scaling, self.use_rslora = {}, {}, {}, {}
        self.merged_adapters = []
        self.register_buffer("base", None, persistent=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the differences are added to."""
        return getattr(*self._where)

    @property
    def weight(self) -> Tensor:
        """The parameter, from which PEFT takes device and dtype."""
        return self.parameter

    @property
    def bias(self) -> None:
        """None, for PEFT."""
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: `write` moves each difference to the parameter's device, and it keeps its dtype."""

    def add(self, adapter: str, difference: Tensor) -> None:
        """Store the difference of one more adapter; it is applied once the adapter is set."""
        if self.base is None:
            self.base = self.parameter.detach().clone()
        difference = difference.float() if difference.dtype.itemsize == 1 else difference
        difference = difference.reshape(self.base.shape).to(self.base.device)
        self.lora_difference[adapter] = nn.Parameter(difference, requires_grad=False)
        self.r[adapter] = self.lora_alpha[adapter] = 1
        self.scaling[adapter], self.use_rslora[adapter] = 1.0, False

    def write(self) -> None:
        """Set the parameter to its base value plus the differences of the active adapters.

        Raises:
            ValueError: the parameter is on the meta device.
        """
        if self.base is None:
            return
        if self.parameter.is_meta:
            raise ValueError(
                f"an adapter changes {self._where[1]!r} of a {type(self._where[0]).__name__}, which is on the meta "
                "device: load, scale and remove adapters before enable_sequential_cpu_offload()"
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
        """Activate adapters as in PEFT; a difference is never trained."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.write()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as in PEFT."""
        self._disable_adapters = not enabled
        self.write()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter, as in PEFT; without effect on one that has no difference here."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self.write()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters, as in PEFT."""
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] *= scale
        self.write()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters, or reset them to 1 (None), as in PEFT."""
        for name in self.scaling.keys() & set(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        self.write()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep adapters (None: the active ones) applied, whichever adapters are set afterwards."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [name for name in names if name in self.scaling and name not in self.merged_adapters]
        self.write()

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged_adapters.clear()
        self.write()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's difference, as in PEFT."""
        super().delete_adapter(adapter_name)
        self.write()


def difference_layers(transformer: nn.Module) -> Iterator[DifferenceLayer]:
    """Iterate over the difference layers of a transformer."""
    tree = getattr(transformer, CHILD, None)
    return iter(()) if tree is None else (module for module in tree.modules() if isinstance(module, DifferenceLayer))


def add_differences(transformer: nn.Module, adapter: str, differences: Mapping[str, Tensor]) -> None:
    """Add the differences of an adapter that PEFT has just loaded, and activate the adapters that PEFT's layers have
    active.

    Args:
        transformer: PEFT's layers of the adapter are in place.
        adapter: name of the adapter; differences that it had before are replaced.
        differences: name of a parameter -> difference.
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
    """Return the difference layer of a parameter; create it if there is none."""
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
    """Remove all differences; every parameter gets its base value back exactly, unless adapters are merged."""
    for layer in difference_layers(transformer):
        layer.set_adapter([])
    delattr(transformer, CHILD)
