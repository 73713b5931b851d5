"""Decode exactly chunk by chunk with Wan's VAE, and faster with fused modules."""
