"""Reference implementations of every operator in plain torch: integer arithmetic, exact on every device.

Conventions, for a linear layer with K input and N output channels:

* channels are permuted so that the `num_outliers` outlier channels come first; group 0 is `[0, num_outliers)`, group 1
  the rest. Either group may be empty.
* a weight is `(code - weight_zero_point[n, g]) * weight_scale[n, g]`, code in `[0, 2**bits - 1]`; 4-bit weights may
  have an integer factor and a zero-point for every 16 channels instead, see `StoredWeight`;
* a static activation is `(code - input_zero_point[g]) * input_scale[g]`, code in `[0, 255]`, held as `code - 128` in
  int8;
* a dynamic activation is `code * scale[m, g]`, code in `[-127, 127]`.

Arguments are not checked here: see `checks`.
"""
