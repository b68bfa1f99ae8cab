"""From a checkpoint and a layer map to the packed file.

Start at compress.py; new quantizers are added to quantizers.py. May import: runtime,
planning.
"""
