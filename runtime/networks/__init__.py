"""The networks in their readable form: plain PyTorch modules, one file per kind.

Read dit.py next to Fig. 2 of the paper, then flow.py (TRELLIS). blocks.py has the layers that they
share, linear.py the packed linear, network.py the base class. May import: kernels, errors, format.
Change arithmetic here first: the fused forms in engines/ are tested against these.
"""
