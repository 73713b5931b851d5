"""One module per step of the work: load, quantize, text, stream, compare."""
