"""Collect LoRAs for Stream Generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .. import folders
from ..compat import NodeError, output, schema, widget, work
from ..handles import LorasType
from ..loras import Lora


class QARVDLora(io.ComfyNode):
    """Add a LoRA to a stack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return schema(
            node_id="QARVDLora",
            display_name="Q-ARVD LoRA",
            description="Adds a LoRA to those that Q-ARVD Stream Generate uses, on a float or quantized pipeline. "
            "Connect one to the next to use several.",
            search_aliases=["lora", "lora stack", "load lora", "adapter"],
            inputs=[
                widget(
                    io.Combo,
                    "lora",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras, made for this kind of Wan model.",
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Factor of the LoRA; 0 leaves it out.",
                ),
                LorasType.Input("loras", optional=True, tooltip="LoRAs of another Q-ARVD LoRA, to use together."),
            ],
            outputs=[output(LorasType, "loras", "The LoRAs, for Q-ARVD Stream Generate.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **_: Any) -> str:
        """Return text that changes with the file."""
        path = folder_paths.get_full_path("loras", lora or "")
        return folders.stamp(Path(path)) if path else ""

    @classmethod
    @work
    def execute(cls, lora: str, strength: float = 1.0, loras: tuple[Lora, ...] = ()) -> io.NodeOutput:
        """Return the stack with one more LoRA."""
        path = folder_paths.get_full_path("loras", lora)
        if path is None:
            raise NodeError(f"There is no LoRA {lora!r} in models/loras.", "Put its file there and choose it again.")
        if any(lora == other.name for other in loras):
            raise NodeError(f"The LoRA {lora} is in the stack twice.", "Use it once, with the sum of the strengths.")
        added = () if strength == 0 else (Lora(lora, path, strength, folders.stamp(Path(path))),)
        return io.NodeOutput((*loras, *added))
