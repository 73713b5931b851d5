"""Define the sizes that are measured, and build random models of those sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..models.world import WorldWanTransformer3DModel

WINDOW_FRAMES = 21  # latent frames that the cache holds: the length that the family is trained on
CACHED_FRAMES = (3, 12, WINDOW_FRAMES)  # visible latent frames at which attention and passes are timed
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    """Describe a Wan transformer and its input.

    Attributes:
        heads: attention heads of 128 channels.
        ffn: hidden channels of the feed-forward network.
        layers: transformer blocks.
        chunk_frames: latent frames that are generated together.
        world: whether it has input channels for a picture and a camera, as LingBot-World has.
    """

    heads: int
    ffn: int
    layers: int
    chunk_frames: int = 3
    world: bool = False

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width: those of 832 x 480 pixels, or a few for the toy."""
        return (60, 104) if self.heads > 1 else (4, 6)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        height, width = self.latent_size
        return height // 2 * (width // 2)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_frames * self.frame_tokens

    @property
    def dim(self) -> int:
        """Channels of the residual stream."""
        return 128 * self.heads

    @property
    def in_channels(self) -> int:
        """Channels of the transformer's input: latents, and where there is one a mask and a picture."""
        return 36 if self.world else 16

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """`(N, K)` of the matrix products of a block, q, k and v as one."""
        return (3 * self.dim, self.dim), (self.dim, self.dim), (self.ffn, self.dim), (self.dim, self.ffn)

    def with_layers(self, layers: int | None) -> Shape:
        """Return the shape with another number of blocks, to fit or for a quick look; None changes nothing."""
        return self if layers is None else replace(self, layers=layers)


_SIZES = {"1.3b": Shape(12, 8960, 30), "14b": Shape(40, 13824, 40), "toy": Shape(1, 256, 2)}
SHAPES = _SIZES | {f"{name}-world": replace(shape, world=True) for name, shape in _SIZES.items()}


def random_transformer(
    shape: Shape, device: torch.device, dtype: torch.dtype, planted_outliers: bool = True
) -> CausalWanTransformer3DModel:
    """Build a transformer with seeded random weights and, as in trained models, outlier channels.

    Planted outliers do not change the model's function: rows of v are scaled down, and the matching columns of the
    attention's output projection up.
    """
    torch.manual_seed(0)
    kind = WorldWanTransformer3DModel if shape.world else CausalWanTransformer3DModel
    with torch.device(device):
        model = kind(
            in_channels=shape.in_channels,
            num_attention_heads=shape.heads,
            ffn_dim=shape.ffn,
            num_layers=shape.layers,
            text_dim=4096 if shape.heads > 1 else 64,
        )
    if planted_outliers:
        with torch.no_grad():
            for block in model.blocks:
                value, out = block.attn1.to_v, block.attn1.to_out[0]
                value.weight[:40] /= 8
                value.bias[:40] /= 8
                out.weight[:, :40] *= 8
    # As `from_pretrained` loads it, some parameters stay in float32.
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the input of one chunk `[1, in_channels, F, H, W]` and text embeddings `[1, 512, text_dim]`."""
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(
        1, shape.in_channels, shape.chunk_frames, *shape.latent_size, generator=generator, device=device
    )
    text = torch.randn(1, TEXT_TOKENS, 4096 if shape.heads > 1 else 64, generator=generator, device=device)
    return latents.to(dtype), text.to(dtype)


def random_controls(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Draw the controls of one chunk `[1, 384, F, H, W]`, as an argument of the transformer if it takes any."""
    if not shape.world:
        return {}
    generator = torch.Generator(device).manual_seed(2)
    size = (1, 384, shape.chunk_frames, *shape.latent_size)
    return {"controls": torch.randn(size, generator=generator, device=device).to(dtype)}
