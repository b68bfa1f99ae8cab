"""Adapters for other projects' pipelines; only here are their APIs known.

May import: every room; nothing imports this one.
"""
