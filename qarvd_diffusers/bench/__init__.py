"""Speed: matrix products, attention and whole transformer passes, side by side with what else there is."""
