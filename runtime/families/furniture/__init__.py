"""The bundled furniture model: its family (family.py) and its two small networks (networks.py).

Compression is judged by the held-out images and shapes: `held_out("unseen-views")`.
"""

from vitapack.runtime.families.furniture.family import HeldOut, held_out

__all__ = ["HeldOut", "held_out"]
