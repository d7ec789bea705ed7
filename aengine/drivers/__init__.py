"""Advancing the loop: on an event loop, on a thread, or without either; and the tasks of a run."""
