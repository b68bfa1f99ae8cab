"""Model families: hyper-parameters, tensor names and defaults, no network code.

hunyuan3d.py is the pattern for a new one (docs/adding.md); open.py finds the family of a
checkpoint. May import: every room but pipeline, tools and integrations.
"""
