"""The same networks, faster: fused forms for CPUs (int8) and GPUs (Triton, CUDA graphs).

choose.py decides once which form runs; cpu_linear.py is the packed linear of the int8 engine. Each
fused form subclasses its readable network and falls back to it, with a log line, if it does not
apply. May import: kernels, format, networks.
"""
