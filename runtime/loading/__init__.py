"""Tensors from disk into modules, once: checkpoint files, lazy components, prefetching.

checkpoint_files.py reads released files, source.py names a component's tensors, fill.py puts them
into a module, lazy.py loads on first use, memory.py measures and returns process memory.
May import: kernels, format, networks, engines.
"""
