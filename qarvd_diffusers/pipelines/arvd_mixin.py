"""Define `ARVDMixin`, which makes a causal video pipeline streamable and quantizable."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..conversion.folder import PORTABLE_CLASSES
from ..quantization.model import quantized_linears, unwrapped
from ..rollout.streamable import StreamableMixin
from .quantizable import QuantizableMixin


class ARVDMixin(StreamableMixin, QuantizableMixin):
    """Add streaming and quantization to a causal `DiffusionPipeline`.

    Put it before `DiffusionPipeline` among the bases. The pipeline implements the contract of `StreamableMixin`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component or another attribute, also from constructors and loaders.

        A module wrapped by `torch.compile` is unwrapped and compiled in place, as by its own `compile` method, so that
        layers have the same names whether the model is compiled or not.
        """
        plain = unwrapped(value) if isinstance(value, torch.nn.Module) else value
        fitted = self.fit_component(name, plain)
        if plain is not value:
            fitted._compiled_call_impl = value.dynamo_ctx(fitted._call_impl)
        super().__setattr__(name, fitted)

    def fit_component(self, name: str, value: Any) -> Any:
        """Return the value to store for `name`; a pipeline may replace components here, or raise an error."""
        return value

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does."""
        # Offloaded weights come from the state dict, which has their rows in natural order.
        for layer in quantized_linears(self.transformer).values():
            layer.store_rows_in(None)
        super().enable_sequential_cpu_offload(*args, **kwargs)

    # Saving: the portable layout.

    def register_to_config(self, **kwargs: Any) -> None:
        """Record components under the stock class names they are saved as."""
        portable = {
            name: PORTABLE_CLASSES.get(value[1], value) if isinstance(value, tuple) and len(value) == 2 else value
            for name, value in kwargs.items()
        }
        super().register_to_config(**portable)

    def to_json_string(self) -> str:
        """`model_index.json`, without the path this pipeline was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
