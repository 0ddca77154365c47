"""Serving: an index behind HTTP, for many people at a time."""
