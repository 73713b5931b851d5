"""What ComfyUI imports where the whole repository is cloned into `custom_nodes/`: the nodes of `comfyui_nodes`."""

WEB_DIRECTORY = "./comfyui_nodes/web"


async def comfy_entrypoint():
    """What ComfyUI calls to learn the nodes."""
    from .comfyui_nodes import comfy_entrypoint as nodes

    return await nodes()
