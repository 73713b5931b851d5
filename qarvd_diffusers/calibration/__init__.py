"""Calibrate: capture, compute, install. Outlier channels, ranges, integer weights, each a plain value or a file."""
