"""One stream: its configuration, inputs, loop over chunks, decoding and saved state."""
