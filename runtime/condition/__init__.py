"""First phase: turns an image into condition tokens.

images.py reads and checks images, recipes.py frames them as each family does, conditioner.py runs
the image encoder (dinov2.py). May import: kernels, format, networks, engines, loading.
"""
