"""What is saved: every part's state at one instant, copied."""
