"""Any data as the next batch: opened, restarted, prefetched, closed."""
