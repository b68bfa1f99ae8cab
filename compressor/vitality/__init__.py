"""Measures the vitality of every block: the EMD between meshes with and without the block.

analyze.py is the entry, ablation.py measures one ablation, journal.py makes runs resumable,
table.py holds the result. May import: runtime, kernels, evaluate.
"""
