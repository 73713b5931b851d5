"""Memory of a stream: shapes, estimates, and plans that fit a budget."""
