"""From a vitality table to a layer map: which blocks stay, in how many bits.

One file a planner; files.py reads and names plans. May import: runtime, vitality's table.
"""
