"""Compares meshes: V-IoU, S-IoU, Chamfer, EMD, F-score.

metrics.py has the table of metrics; a new one is a row there. May import: runtime, kernels.
"""
