"""Keep keys and values of earlier frames, in float or 8-bit storage."""
