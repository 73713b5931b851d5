"""The forward pass of the causal Wan transformer on fused integer kernels."""
