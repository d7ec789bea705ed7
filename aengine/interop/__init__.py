"""Other libraries' handlers and metrics on our engine, one file each."""
