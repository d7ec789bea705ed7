"""Events and what listens to them: topics, inboxes, subscribers, streams."""
