"""From a checkpoint and a layer map to the packed file.

compress.py is the entry; quantizers.py is where a new quantizer goes. May import: runtime,
planning.
"""
