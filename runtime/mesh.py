"""`vitapack.runtime.mesh`, the short public name of `vitapack.runtime.decode.mesh`."""

from vitapack.runtime.decode.mesh import Mesh, MeshReport, clean, load, report, save

__all__ = ["Mesh", "MeshReport", "clean", "load", "report", "save"]
