"""Quantize one layer: affine arithmetic, bit packing, `QARVDLinear`, installing into a model and removal."""
