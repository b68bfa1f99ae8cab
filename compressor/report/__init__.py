"""Renders meshes and writes the HTML report; the demo runs every step.

May import: every room of the compressor.
"""
