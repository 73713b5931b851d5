"""Speed: matrix products, attention, transformer passes and whole videos, side by side with what else there is."""

SHAPE_NAMES = ("1.3b", "14b", "toy")
# What a transformer pass is measured with: the float model, other quantizers, our schemes ("-attention8": 8-bit K/V).
PASS_VARIANTS = (
    "bf16",
    "bf16-compiled",
    "torchao-fp8",
    "torchao-int8",
    "w8a8",
    "w4a8",
    "w8a8-attention8",
    "w4a8-attention8",
)
# Of whole videos; "-overlap": frames are decoded beside the next chunk's denoising.
VIDEO_VARIANTS = (
    "bf16",
    "bf16-compiled",
    "w8a8",
    "w8a8-overlap",
    "w8a8-attention8",
    "w8a8-attention8-overlap",
    "w4a8-attention8",
)
