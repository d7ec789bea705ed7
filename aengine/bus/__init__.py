"""Who listens: topics, inboxes, subscribers, streams."""
