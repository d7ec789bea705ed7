"""What people type: `python -m aengine checkpoints`."""
