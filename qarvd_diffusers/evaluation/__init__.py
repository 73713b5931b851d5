"""What a quantized model lost: fidelity per chunk, prompt adherence, and the pictures that show it."""
