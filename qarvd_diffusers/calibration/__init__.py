"""Calibration: capture, compute, apply. Outlier channels, ranges, integer weights; each stage a plain value or a file."""
