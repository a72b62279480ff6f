"""Runnable examples; each prints what it showed."""
