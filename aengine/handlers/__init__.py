"""Ready-made handlers, one file each."""
