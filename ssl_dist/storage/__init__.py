"""Files: written whole or not at all, checkpoints, features, and weights of other programs."""

__all__ = ["checkpoint", "durable", "features", "weights"]
