"""Continuous flows that predict training at the edge of stability."""
