"""Self-supervised pre-training of image backbones at any world size, and its evaluation."""

__version__ = "0.1.0"
