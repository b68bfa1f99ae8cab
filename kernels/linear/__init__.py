"""Packed linears: the reference, the int8 engine for CPUs, the Triton kernels and the dispatch.

Read layouts.py (how weights are stored), weights.py and reference.py (plain PyTorch, exact), then
dispatch.py. cpu.py binds csrc/int8; triton_gemm.py and triton_rows.py are the GPU kernels,
gpu_ops.py their operators, gemm_table.py the measured tile configurations. May import: only torch,
triton and vitapack's compiled modules.
"""
