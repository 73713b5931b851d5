"""ComfyUI nodes of Q-ARVD: quantize autoregressive video models and stream from them, every chunk visible as it is made.

ComfyUI imports this package from `custom_nodes/`. It needs `qarvd_diffusers`, but only when a node runs: a missing library is
one clear node error, not a pack that fails to load. See README.md.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to learn the nodes."""
    from .extension import QARVDExtension

    return QARVDExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
