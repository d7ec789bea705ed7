"""What people type: `aengine checkpoints`."""
