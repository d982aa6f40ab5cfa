"""Watching a training loop: what to measure when, and what it means."""
