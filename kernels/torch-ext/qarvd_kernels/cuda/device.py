"""Check which devices the CUDA sources support."""

from __future__ import annotations

import torch


def unsupported_device(device: torch.device) -> str | None:
    """Return why the kernels of this folder cannot run on a device, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"written for compute capability 9.0 (Hopper), this device has {major}.{minor}"
    return None
