"""Import paths of version 0.1 that moved: each still works, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Old module -> new modules, below this package; removed with version 0.3.
MOVED: dict[str, tuple[str, ...]] = {
    "calibration.compensation": ("calibration.gptq",),
    "calibration.result": ("quantization.result",),
    "linear": ("quantization.linear", "quantization.qparams", "quantization.model"),
    "model_card": ("hub.model_card",),
    "models.cached_attention": ("models.fused.attention",),
    "models.causal_fields": ("rollout.config",),
    "models.fused_block": ("models.fused.block",),
    "models.fused_pass": ("models.fused.forward",),
    "models.kv_cache": ("kv_cache.cache",),
    "models.kv_storage": ("kv_cache.storage",),
    "models.pass_info": ("rollout.pass_info",),
    "models.single_file": ("models.single_file_header",),
    "models.stretches": ("models.fused.cuda_graphs",),
    "packing": ("quantization.packing",),
    "pipelines.chunk_loop": ("rollout.chunk_loop",),
    "pipelines.decoding": ("rollout.decode_queue",),
    "pipelines.fast_vae": ("vae.fused",),
    "pipelines.inputs": ("rollout.inputs",),
    "pipelines.memory": ("memory.plan",),
    "pipelines.mixed_bits": ("calibration.mixed_precision",),
    "pipelines.model_shapes": ("memory.shapes",),
    "pipelines.output": ("rollout.output",),
    "pipelines.reencoding": ("rollout.reencoding",),
    "pipelines.sensitivity": ("calibration.measure_sensitivity",),
    "pipelines.stream": ("rollout.stream",),
    "pipelines.stream_run": ("rollout.generate",),
    "pipelines.stream_session": ("rollout.session",),
    "pipelines.stream_state": ("rollout.saved_state",),
    "pipelines.streaming_vae": ("vae.streaming",),
    "pipelines.text_encoder": ("rollout.text_encoder",),
    "pipelines.video_start": ("rollout.video_start",),
    "presets": ("conversion.families",),
    "primitives": ("quantization.affine",),
    "serialization": (
        "quantization.model",
        "files.atomic",
    ),
    "tensor_files": ("files.safetensors",),
    "weight_view": ("quantization.dequantized_weight",),
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports an old module as a view of the new ones; asked only where no file answers to the name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        new = [f"{package}.{part}" for part in MOVED[name]]
        warnings.warn(
            f"{module.__name__} moved: import from {' or '.join(new)} instead", DeprecationWarning, stacklevel=2
        )
        for source in reversed(new):
            module.__dict__.update(
                {
                    key: value
                    for key, value in vars(importlib.import_module(source)).items()
                    if key[:2] != "__" or key == "__getattr__"
                }
            )


def install() -> None:
    """Let the old paths be imported."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
