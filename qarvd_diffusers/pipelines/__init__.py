"""Streaming pipelines: the chunk loop, exact streaming decode, and what makes a pipeline quantizable."""
