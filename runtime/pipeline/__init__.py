"""Image to mesh: the one room that uses all others.

pipeline.py runs the three phases, load.py opens networks, predict.py and phases.py predict and
measure memory. May import: every room but tools and integrations.
"""
