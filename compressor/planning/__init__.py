"""From a vitality table to a layer map: which blocks are kept, and in how many bits.

One file per planner; files.py reads and describes plans. May import: runtime, vitality's table.
"""
