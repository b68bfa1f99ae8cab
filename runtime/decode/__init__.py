"""Third phase: turns latents into a grid of logits, and the grid into a mesh.

shape_vae.py and occupancy.py are the networks, grid.py evaluates coarse to fine, mesh.py extracts,
cleans and writes the surface. May import: kernels, format, networks, engines, loading.
"""
