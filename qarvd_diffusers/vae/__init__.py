"""Exact streaming decoding with Wan's VAE, and its fused modules."""
