"""The networks in their readable form: plain PyTorch modules, one file per kind.

Read dit.py beside Fig. 2 of the paper, then flow.py (TRELLIS). blocks.py has what they share,
linear.py the packed linear, kinds.py the table of kinds. May import: kernels, errors, format.
Change arithmetic here first: the fused forms in engines/ are tested against these.
"""
