"""A run's network for other programs: files and folders that their own functions load."""

__all__ = ["card", "command", "folders", "graphs", "libraries", "preprocessing", "trained"]
