"""Measure a pre-trained backbone by training on top of it: linear probes and fine-tuning."""

__all__ = ["classification", "recipe", "subject"]
