"""Kernels in CUDA C++ for Hopper GPUs, built on the user's machine when first needed."""
