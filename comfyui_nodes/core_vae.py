"""Use the Wan VAE that ComfyUI has loaded in a pipeline; on the CPU both share its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .compat import NodeError, ordinary

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_REMEDY = "Connect Load VAE with the file of Wan 2.1, such as wan_2.1_vae.safetensors."


def pipeline_vae(vae: Any) -> AutoencoderKLWan:
    """Return a diffusers VAE with the weights of ComfyUI's.

    Raises:
        NodeError: if it is not Wan 2.1's architecture.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    module = vae.first_stage_model
    own = module.state_dict()
    if "decoder.middle.0.residual.0.gamma" not in own or not hasattr(module, "temperal_downsample"):
        raise NodeError(f"vae is a {type(module).__name__}, expected the VAE of Wan 2.1.", _REMEDY)
    own = {name: ordinary(tensor.detach()) for name, tensor in own.items()}
    tensors = convert_wan_vae_to_diffusers(dict(own))
    with init_empty_weights():
        made = AutoencoderKLWan(
            base_dim=module.dim,
            z_dim=module.z_dim,
            dim_mult=list(module.dim_mult),
            num_res_blocks=module.num_res_blocks,
            temperal_downsample=list(module.temperal_downsample),
        )
    try:
        made.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise NodeError(
            f"vae has other tensors than Wan 2.1's: {' '.join(str(error).split())[:300]}.", _REMEDY
        ) from error
    if any(not torch.is_floating_point(tensor) or tensor.dtype.itemsize == 1 for tensor in tensors.values()):
        raise NodeError("vae is stored in 8 bits.", _REMEDY)
    return made.eval().requires_grad_(False)
