"""Offline: an original checkpoint and images become a packed file.

Rooms in the order of the work: vitality, planning, packing, distill, evaluate, report.
"""
