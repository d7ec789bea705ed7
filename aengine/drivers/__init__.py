"""Who advances the loop: on an event loop, on a thread, or on neither."""
