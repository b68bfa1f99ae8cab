"""The packed file: its container, header, layer map, architectures and sampling schedules.

docs/format.md is the specification; read layermap.py, architecture.py, tensors.py, then header.py.
Torch-free except reader.py, so `vitapack inspect` starts without torch. May import: errors, files
and kernels/linear/layouts.py, where a new weight layout starts. A new network kind starts in
architecture.py.
"""
