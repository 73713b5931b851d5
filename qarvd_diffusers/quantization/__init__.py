"""One quantized layer: affine maths, bit layout, `QARVDLinear`, and putting it into a model."""
