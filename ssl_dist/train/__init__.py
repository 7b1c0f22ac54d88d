"""Pre-training: the loop and its state, checks before it, relabelling, and measurements during it."""
