"""The loop: a generator that does no I/O, and what it yields and is asked."""
