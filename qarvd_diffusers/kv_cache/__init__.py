"""What a stream remembers: keys and values of earlier frames, and the formats they are stored in."""
