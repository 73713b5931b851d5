"""Links the noise of the first chunk to the scene that it shows.

A few-step model that must choose a start position from pure noise averages over all of them and stays blurry. Here the
eight numbers that a caption leaves open (`scenes.NUM_STATES`) *are* eight coordinates of the noise: its projections on
fixed unit vectors, a 2x2 checkerboard in one latent channel each. The noise stays exactly N(0, I) and the data keeps
its distribution, but prompt and noise now determine the whole clip, and every denoising step is plain regression.

The checkerboard is blind to flat latents, so the projection of a partly noised latent is approximately that of its
noise alone: at each of the first steps the fresh noise chooses the scene again, and the last step only refines.
"""

from __future__ import annotations

import torch
from scenes import NUM_STATES


def _checkerboard(x: torch.Tensor) -> torch.Tensor:
    """Unit-norm pattern [F, H, W] for latents [N, C, F, H, W]."""
    frames, height, width = x.shape[2:]
    rows, columns = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    sign = 1.0 - 2.0 * ((rows + columns) % 2)
    return (sign / (frames * height * width) ** 0.5).expand(frames, height, width)


def read_state(x: torch.Tensor, sigma) -> torch.Tensor:
    """[N, 8] states that noised latents `x` [N, 16, 3, H, W] at noise level `sigma` stand for."""
    return torch.einsum("ncfhw,fhw->nc", x[:, :NUM_STATES], _checkerboard(x)) / sigma


def write_state(x: torch.Tensor, state: torch.Tensor, sigma) -> torch.Tensor:
    """`x` with its projections replaced, such that `read_state(result, sigma) == state`."""
    pattern = _checkerboard(x)
    change = sigma * state - torch.einsum("ncfhw,fhw->nc", x[:, :NUM_STATES], pattern)
    head = x[:, :NUM_STATES] + change[:, :, None, None, None] * pattern
    return torch.cat([head, x[:, NUM_STATES:]], dim=1)
