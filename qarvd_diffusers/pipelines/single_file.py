"""`from_single_file` and `save_single_file`: the transformer and the pipeline's config in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import save_single_file
from ..models.single_file_header import read_single_file
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..rollout.arguments import parameters
from .arguments import loading_arguments
from .quantization import split_config

if TYPE_CHECKING:
    from typing_extensions import Self


_OF_THE_FILE = {"dtype", "quantization_config"}  # loading arguments that need no base


class SingleFileMixin:
    """One safetensors file under original key names, which ComfyUI and diffusers both load.

    Put it before `DiffusionPipeline` among the bases of a pipeline with a causal Wan `transformer`.
    """

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Self:
        """A pipeline around the transformer in a file that `save_single_file` wrote.

        Args:
            path: the file, float or quantized.
            base: diffusers folder or Hub id of a Wan model, which lends VAE, text encoder and tokenizer; None takes those
                in `kwargs`, or none.
            **kwargs: `dtype`, also one per component; components by name (`vae`, `text_encoder`, `tokenizer`); fields of the
                config to replace; `quantization_config`; with a `base`, what else `from_pretrained` takes, for the base's
                parts.

        Raises:
            ValueError: the file has no header of ours, is truncated, or does not hold what its header tells; or an argument
                cannot be honoured.
            TypeError: without a base, for arguments that only loading a base can honour.
        """
        kwargs = loading_arguments(cls, kwargs)
        if kwargs.pop("device_map", None) is not None:
            raise ValueError(
                "device_map places the parts of a folder while they are loaded, a single file is loaded whole: leave it out, and "
                "call to() or enable_model_cpu_offload() afterwards"
            )
        header = read_single_file(path)
        if header is None:
            raise ValueError(
                f"{path}: does not tell how its model rolls out; convert it first: qarvd convert {Path(path).name} FOLDER "
                "--family NAME"
            )
        if base is None and (unknown := sorted(kwargs.keys() - set(parameters(cls.__init__)[0]) - _OF_THE_FILE)):
            raise TypeError(
                f"from_single_file takes {unknown} only for the parts that a base lends: give base, or leave them out"
            )
        dtype, config = kwargs.pop("dtype", None), kwargs.pop("quantization_config", None)
        own = dtype.get("transformer", dtype.get("default")) if isinstance(dtype, dict) else dtype
        transformer = CausalWanTransformer3DModel.from_single_file(path, **({} if own is None else {"dtype": own}))
        given = {**header.pipeline, **kwargs, "transformer": transformer}
        if base is not None:
            pipe = cls.from_pretrained(base, **given, dtype=dtype, quantization_config=config)
            pipe.source = str(path)
            return pipe
        ours, rest = split_config(config)
        if rest is not None:
            raise ValueError(
                "quantization_config names components that only a base lends: give base, or a QARVDConfig"
            )
        pipe = cls(**given)
        pipe.source = str(path)
        pipe.quantize_on_loading(ours)
        return pipe

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write transformer, its quantization and the pipeline's config as one safetensors file under original names.

        Raises:
            ValueError: another suffix, or an adapter is attached.
        """
        save_single_file(self.transformer, self.config, path)
