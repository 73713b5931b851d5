"""Measure what quantization costs: fidelity per chunk, prompt adherence, and the pictures that show it."""
