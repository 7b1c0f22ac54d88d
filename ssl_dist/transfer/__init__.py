"""Trainings on top of a pre-trained backbone that measure it: linear probes and fine-tuning."""

__all__ = ["classification", "recipe", "subject"]
