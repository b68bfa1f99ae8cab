"""vitapack makes image-to-3D-shape Diffusion Transformers small and runs them small.

`vitapack.compressor` turns an original checkpoint into one packed file, offline;
`vitapack.runtime` turns that file and an image into a mesh; `vitapack.kernels` has the compiled
functions of both.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout the subpackages are at the top level, next to this folder. A wheel has them
# inside this folder, so the test below is false and costs two stat calls.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
del _checkout, Path
