"""Ranks: who this process is, how ranks find each other, what they exchange, and how a hang ends."""

__all__ = ["heartbeat", "rank", "ranklog", "rendezvous", "signals", "watchdog", "world"]
