"""Runs as Slurm jobs, through submitit."""

__all__ = ["local", "script", "status", "submit"]
