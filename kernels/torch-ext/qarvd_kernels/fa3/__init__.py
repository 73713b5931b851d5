"""FlashAttention-3 of the optional package `fa3-fwd`, which is built for Hopper GPUs."""
