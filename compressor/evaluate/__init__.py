"""Compares meshes: V-IoU, S-IoU, Chamfer, EMD, F-score.

metrics.py has the table of metrics; a new metric is one row. May import: runtime, kernels.
"""
