"""Describe what a user does to a running video: camera, keys and mouse, events."""
