"""Ranks: their launch, rendezvous and collectives, and the watchdog that ends a run which hangs."""

__all__ = ["heartbeat", "rank", "ranklog", "rendezvous", "signals", "watchdog", "world"]
