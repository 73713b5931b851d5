"""Load and save the transformer and the pipeline's config as one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import save_single_file
from ..files.safetensors import DOWNLOAD
from ..models.single_file_header import read_single_file
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..quantization.stored_model import check_arguments
from ..rollout.arguments import parameters
from .arguments import loading_arguments
from .quantization import split_config
from .stored_components import named_errors

if TYPE_CHECKING:
    from typing_extensions import Self


_OF_THE_FILE = {"dtype", "quantization_config"}  # loading arguments that work without a base


class SingleFileMixin:
    """Load and save one safetensors file with original key names, which ComfyUI and diffusers both load.

    Put it before `DiffusionPipeline` among the bases of a pipeline with a causal Wan `transformer`.
    """

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Self:
        """Load a pipeline with the transformer of a file that `save_single_file` or `qarvd convert` wrote.

        Args:
            path: the file, float or quantized.
            base: diffusers folder or Hub id of a Wan model that provides VAE, text encoder and tokenizer; None takes
                them from `kwargs`, if they are passed.
            **kwargs: `dtype`, also one per component; components by name (`vae`, `text_encoder`, `tokenizer`); values
                of the config to replace; `quantization_config`; with a `base`, other arguments of `from_pretrained`,
                which apply to the base's components.

        Raises:
            ValueError: if the file has no header of Q-ARVD, is truncated or disagrees with its header, or for an
                unsupported argument.
            TypeError: without a base, for arguments that need one.
        """
        kwargs = loading_arguments(cls, kwargs)
        if kwargs.pop("device_map", None) is not None:
            raise ValueError(
                "device_map is not supported for a single file, which is loaded as a whole: leave it out, and call "
                "to() or enable_model_cpu_offload() afterwards"
            )
        with named_errors(str(path), None, ()):
            return cls._from_single_file(path, base, kwargs)

    @classmethod
    def _from_single_file(
        cls, path: str | os.PathLike[str], base: str | os.PathLike[str] | None, kwargs: dict[str, Any]
    ) -> Self:
        """Load as `from_single_file` says, from checked arguments."""
        header = read_single_file(path)
        if header is None:
            raise ValueError(
                f"{path}: has no header that says how its model rolls out; convert it first: qarvd convert "
                f"{Path(path).name} FOLDER --family NAME"
            )
        if base is None and (unknown := sorted(kwargs.keys() - set(parameters(cls.__init__)[0]) - _OF_THE_FILE)):
            raise TypeError(
                f"from_single_file takes {unknown} only for the components of a base: pass base, or leave them out"
            )
        dtype, config = kwargs.pop("dtype", None), kwargs.pop("quantization_config", None)
        own = dtype.get("transformer", dtype.get("default")) if isinstance(dtype, dict) else dtype
        transformer = CausalWanTransformer3DModel.from_single_file(path, **({} if own is None else {"dtype": own}))
        fields = parameters(cls.__init__)[0]
        if strange := sorted(header.pipeline.keys() - set(fields)):
            raise ValueError(f"{path}: its header has the unknown pipeline fields {strange}: {DOWNLOAD}")
        check_arguments(cls, header.pipeline, f"{path}: pipeline")
        values = {**header.pipeline, **kwargs, "transformer": transformer}
        if base is not None:
            pipe = cls.from_pretrained(base, **values, dtype=dtype, quantization_config=config)
            pipe.source = str(path)
            return pipe
        ours, rest = split_config(config)
        if rest is not None:
            raise ValueError(
                "quantization_config names components that only a base provides: pass base, or a QARVDConfig"
            )
        pipe = cls(**values)
        pipe.source = str(path)
        pipe.quantize_on_loading(ours)
        return pipe

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write transformer, its quantization and the pipeline's config as one safetensors file under original names.

        Raises:
            ValueError: for another suffix, or if an adapter is attached.
        """
        save_single_file(self.transformer, self.config, path)
