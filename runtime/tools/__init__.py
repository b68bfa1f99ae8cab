"""Measures and reports: bench, doctor, FLOP counts, GEMM autotuning.

Only the command line and the benchmarks import these. May import: every other room.
"""
