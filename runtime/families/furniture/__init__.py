"""The bundled furniture model: its family (family.py) and its two small networks (networks.py).

The held-out pictures and shapes that everything here is judged by: `held_out("unseen-views")`.
"""

from vitapack.runtime.families.furniture.family import HeldOut, held_out

__all__ = ["HeldOut", "held_out"]
