"""Measures how vital each block is: the EMD of the mesh with the block skipped.

analyze.py is the entry, ablation.py measures one block, journal.py makes it resumable, table.py is
the result. May import: runtime, kernels, evaluate.
"""
