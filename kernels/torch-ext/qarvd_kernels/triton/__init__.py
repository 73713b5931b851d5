"""Implement operators in Triton, for NVIDIA GPUs with int8 tensor cores. Imported only where Triton is installed."""
