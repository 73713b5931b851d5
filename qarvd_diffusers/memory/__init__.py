"""Estimate the memory of a stream, and plan streams that fit a budget."""
