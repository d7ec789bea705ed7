"""How captured state becomes files, and files become state again."""
