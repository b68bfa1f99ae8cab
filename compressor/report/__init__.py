"""Renders meshes and writes the HTML report; the demo runs every step.

May import: every package of the compressor.
"""
