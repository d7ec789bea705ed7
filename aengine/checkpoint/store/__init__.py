"""The directory: drafts, commits, locks, retention, verification. No torch."""
