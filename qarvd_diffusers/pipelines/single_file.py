"""`from_single_file` and `save_single_file`: the transformer and the pipeline's config in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import save_single_file
from ..models.single_file import read_single_file
from ..models.transformer_causal_wan import CausalWanTransformer3DModel

if TYPE_CHECKING:
    from typing_extensions import Self


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
            **kwargs: `dtype`; components by name (`vae`, `text_encoder`, `tokenizer`); fields of the config to replace.

        Raises:
            ValueError: the file has no header of ours, is truncated, or does not hold what its header tells.
        """
        header = read_single_file(path)
        if header is None:
            raise ValueError(
                f"{path}: does not tell how its model rolls out; convert it first: qarvd convert {Path(path).name} FOLDER "
                "--family NAME"
            )
        dtype = {"dtype": kwargs.pop("dtype")} if "dtype" in kwargs else {}
        given = {
            **header.pipeline,
            **kwargs,
            "transformer": CausalWanTransformer3DModel.from_single_file(path, **dtype),
        }
        pipe = cls(**given) if base is None else cls.from_pretrained(base, **given, **dtype)
        pipe.source = str(path)
        return pipe

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write transformer, its quantization and the pipeline's config as one safetensors file under original names.

        Raises:
            ValueError: another suffix, or an adapter is attached.
        """
        save_single_file(self.transformer, self.config, path)
