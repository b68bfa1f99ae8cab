"""Offline compression: makes a packed file from an original checkpoint and images.

Packages in the order of the work: vitality, planning, packing, distill, evaluate, report.
"""
