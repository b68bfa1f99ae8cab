"""Packed linears: the reference, the CPU engine, the Triton kernels and who runs when.

Read reference.py (plain PyTorch, exact), then dispatch.py. cpu.py binds csrc/int8; triton_gemm.py
and triton_rows.py are the GPU kernels, gpu_ops.py their operators, gemm_table.py the measured tile
configurations. May import: torch, triton and vitapack's compiled parts only.
"""
