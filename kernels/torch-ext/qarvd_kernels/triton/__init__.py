"""Implementations in Triton, for NVIDIA GPUs with int8 tensor cores. Nothing here is imported where Triton is missing."""
