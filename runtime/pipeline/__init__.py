"""Image to mesh: the one place where all rooms meet.

pipeline.py runs the three phases, load.py opens networks, predict.py and phases.py predict and
measure memory. May import: every room but tools and integrations.
"""
