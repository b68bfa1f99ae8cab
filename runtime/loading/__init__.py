"""Loading: tensors from disk into modules, lazily and ahead of their phase.

checkpoint_files.py reads released files, source.py names a component's tensors, fill.py puts them
into a module, lazy.py loads on first use, prefetch.py on a background thread, memory.py measures
and returns process memory.
May import: kernels, format, networks, engines.
"""
