"""The packed file of docs/format.md's worked example, made of plain numbers without torch.

`python tests/helpers/golden_packed.py` writes it anew; its bytes may only change with the format
version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.runtime.format.architecture import architecture_from_json
from vitapack.runtime.format.container import lay_out, write_container
from vitapack.runtime.format.header import KEY, PackedContent, schedule_nodes
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.format.tensors import model_tensors, plan_linears

GOLDEN = Path(__file__).parents[1] / "data" / "packed_v1.safetensors"
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
SAMPLER = SamplerDefaults("euler", 3, 5.0)
LAYER_MAP = LayerMap(
    "hunyuan3d",
    {"double": 2, "single": 1},
    (BlockEntry("double", 1, 4, 0.25), BlockEntry("single", 0, 8, 0.5)),
    how="by hand",
)
NETWORK = architecture_from_json({
    "kind": "double-single-dit", "in_channels": 2, "cond_channels": 3, "hidden": 4, "heads": 2,
    "double_blocks": [1], "single_blocks": [0], "mlp_ratio": 2.0, "qkv_bias": True,
    "guidance_embed": False,
    "time": {
        "channels": 8, "hidden": 4, "scale": 1000.0, "max_period": 1000.0, "cos_first": True,
        "activation": "silu",
    },
})  # fmt: skip


def fields() -> dict[str, Any]:
    """The fields of `PackedContent`."""
    return {
        "tool": "vitapack 0.1.0",
        "family": "hunyuan3d",
        "variant": "worked example",
        "network": NETWORK,
        "source": {"name": "model.fp16.safetensors", "sha256": "0123456789abcdef" * 4, "bytes": 99},
        "layer_map": LAYER_MAP,
        "linears": plan_linears(NETWORK, LAYER_MAP, "table"),
        "rest": "F16",
        "quantizer": "rtn",
        "modulation": {
            "kind": "table", "dtype": "F16", "guidance": None, "nodes": 2,
            "schedules": [SAMPLER.to_json()],
        },
        "sampler": SAMPLER.to_json(),
        "shape_decoder": {"storage": "embedded", "config": {"width": 2}, "source": None},
        "conditioner": {"storage": "none", "config": {}, "source": None},
    }  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    """Every tensor of the example: counted values, exact in their dtypes."""
    made = fields()
    specs = model_tensors(NETWORK, made["linears"], "F16", made["modulation"])
    specs["vae.post_kl.weight"] = ("F16", (2, 2))
    tensors = {}
    for place, (name, (dtype, shape)) in enumerate(sorted(specs.items())):
        count = np.arange(int(np.prod(shape))) + place
        if name == "modulation.t":
            values = np.array(schedule_nodes([SAMPLER]))
        elif name.endswith(".weight.group"):
            values = (count * 37) % 128  # s up to 8, so that nothing leaves +-127
        elif name.endswith(".weight.q4"):
            values = int4_bytes(name, shape[0], tensors[name.replace(".q4", ".group")])
        elif name.endswith(".weight.scale"):
            values = (count % 17 + 1) / 64
        elif dtype == "I8":
            values = (count * 37) % 255 - 127
        else:
            values = (count % 17 - 8) / 8
        tensors[name] = values.astype(NUMPY[dtype]).reshape(shape)
    return tensors


def int4_bytes(name: str, rows: int, group: np.ndarray) -> np.ndarray:
    """Codes counted up along each row, z in the padding so that it expands to 0; one K block."""
    inputs = NETWORK.linears()[name.removeprefix("model.").removesuffix(".weight.q4")].inputs
    codes = (np.arange(64) * 3 + np.arange(rows)[:, None] * 5) % 16
    zero = np.repeat(group & 15, 32, axis=1)
    codes = np.where(np.arange(64) < inputs, codes, zero)
    return codes[:, :32] | codes[:, 32:] << 4


def content() -> dict[str, Any]:
    """The same fields as JSON, for tests that break them."""
    made = json.loads(PackedContent(**fields()).dumps())
    del made["format"]
    return made


def write_packed(
    path: Path, changes: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """The example with changed header fields (or other tensors): what the tests break."""
    made = arrays() if tensors is None else tensors
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}
    specs = {name: (names[array.dtype], array.shape) for name, array in made.items()}
    layout = lay_out(specs, {KEY: PackedContent(**fields() | (changes or {})).dumps()})
    write_container(path, layout, ((name, array.tobytes()) for name, array in made.items()))
    return path


if __name__ == "__main__":
    print(write_packed(GOLDEN))
