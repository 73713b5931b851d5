"""Provide ComfyUI nodes that quantize autoregressive video models and stream from them, chunk by chunk.

ComfyUI imports this package from `custom_nodes/`. `qarvd_diffusers` is imported only when a node runs: a missing
library is one node error, not a pack that fails to load. See README.md.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension; ComfyUI calls this to list the nodes."""
    from .extension import QARVDExtension

    return QARVDExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
