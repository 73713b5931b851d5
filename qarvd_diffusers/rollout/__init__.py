"""Run one stream: its config, inputs, loop over chunks, decoding and saved state."""
