"""Measure speed: matrix products, attention, transformer passes and whole videos, next to other implementations."""

SHAPE_NAMES = ("1.3b", "14b", "toy", "1.3b-world", "14b-world", "toy-world")
# Variants of a transformer pass: the float model, other quantizers, our schemes ("-int8", "-fp8": storage of K/V).
PASS_VARIANTS = (
    "bf16",
    "bf16-compiled",
    "torchao-fp8",
    "torchao-int8",
    "w8a8",
    "w4a8",
    "w8a8-int8",
    "w4a8-int8",
    "w8a8-fp8",
    "w4a8-fp8",
)
# Variants of whole videos; "-overlap": frames are decoded during the next chunk's denoising.
VIDEO_VARIANTS = (
    "bf16",
    "bf16-compiled",
    "w8a8",
    "w8a8-overlap",
    "w8a8-int8",
    "w8a8-int8-overlap",
    "w4a8-int8",
    "w8a8-fp8",
)
