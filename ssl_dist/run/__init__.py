"""A run: its plan, its folder, its log and plots, and what is read from its checkpoints."""

__all__ = ["blueprint", "encoder", "exported", "folder", "labels", "log", "plots"]
