"""Crossing threads: the event loop as seen from a thread, the worker, torch's thread-local settings."""
