"""The packed file: its container, header, layer map, weight layouts and sampling schedules.

docs/format.md is the specification; read layermap.py, architecture.py, tensors.py, then header.py.
Torch-free except reader.py, so `vitapack inspect` starts without torch. May import: errors, files.
A new weight layout starts in kernels/linear/layouts.py, a new network kind in architecture.py.
"""
