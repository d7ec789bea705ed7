"""Checkpoints that survive, and runs that resume exactly."""
