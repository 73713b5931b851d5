"""Implement operators in CUDA C++ for Hopper GPUs, built on the user's machine at first use."""
