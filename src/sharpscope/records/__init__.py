"""Rows of a run in memory and on disk, and checkpoints."""
