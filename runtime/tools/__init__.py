"""Measures and reports: bench, doctor, FLOP counts, GEMM autotuning.

Nothing imports these but the command line and benchmarks. May import: every other room.
"""
