"""Checkpoints with random weights in released layouts, for tests and benchmarks.

May import: runtime.
"""
