"""What every family's checkpoint is to the rest of the house, and what their readers share.

A family is a small file: hyper-parameters, names, defaults, no network code. It exports `FAMILY`,
which `vitapack.runtime.families` lists; `hunyuan3d.py` is the pattern.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vitapack.runtime.engines.choose import network_of
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.container import NO_DIGEST, one_line, parse_json
from vitapack.runtime.format.header import PARTS
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import (
    INDEX,
    MOST,
    PICKLED,
    Weights,
    dtype_name,
    open_weights,
    some,
)
from vitapack.runtime.loading.source import Source

# A released config.yaml has 3 KB. PyYAML takes a second for 100 KB of it.
MAX_CONFIG = 1 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One original checkpoint: everything but the tensors, which are read one by one.

    `part` is "shape_decoder" or "conditioner"; the network itself has methods of its own.
    """

    family: str
    variant: str  # "hunyuan3d-2mini-turbo"; names the released model where it is one
    path: Path  # as the user gave it
    config: Any  # an Architecture
    sampler: SamplerDefaults
    latents: tuple[int, ...] | None  # tokens, channels; None where only the DiT is there
    decoder: Any  # the family's decoder config (ShapeDecoderConfig, ...), None where unknown
    scale_factor: float | None  # the DiT's latents are the autoencoder's times this
    weights: Weights  # names "model.<canonical>", "vae.<...>", "conditioner.<...>"
    ignored: tuple[str, ...] = ()  # tensors that are not needed, on purpose
    unknown: tuple[str, ...] = ()  # settings that this reader does not know, taken as harmless
    sections: Mapping[str, Any] = field(default_factory=dict)  # of config.yaml

    def names(self) -> list[str]:
        """The network's tensors, by canonical name."""
        return self._names("model")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(f"model.{name}")

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(f"model.{name}")

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor of the network, in its stored dtype. FormatError for NaN, infinity."""
        return self.weights.read(f"model.{name}")

    def part_config(self, part: str) -> dict[str, Any]:
        """`params` of the part's section in config.yaml, {} if it has none: JSON."""
        section = self.sections.get(PARTS[part])
        return dict((section or {}).get("params") or {})

    def part_shapes(self, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype name and shape of each of the part's tensors, by name."""
        prefix = PARTS[part]
        return {
            name: (
                dtype_name(self.weights.dtype(f"{prefix}.{name}")),
                self.weights.shape(f"{prefix}.{name}"),
            )
            for name in self._names(prefix)
        }

    def part_tensor(self, part: str, name: str) -> Tensor:
        """Reads one tensor of a part, in its stored dtype. FormatError for NaN and infinity."""
        return self.weights.read(f"{PARTS[part]}.{name}")

    def component(self, part: str) -> Source:
        """The part's settings and tensors. UserError where the checkpoint holds no such part."""
        shapes = {name: shape for name, (_, shape) in self.part_shapes(part).items()}
        if not shapes:
            raise UserError(f"{self.path} ({self.variant}) holds no {part.replace('_', ' ')}")
        return Source(
            str(self.path), self.part_config(part), shapes, partial(self.part_tensor, part)
        )

    def parameters(self, part: str | None = None) -> int:
        """Weights and biases of the network, or of a part; an fp16 file holds two bytes of each."""
        shapes = (
            [self.shape(name) for name in self.names()]
            if part is None
            else [shape for _, shape in self.part_shapes(part).values()]
        )
        return sum(math.prod(shape) for shape in shapes)

    def source(self, hashed: bool) -> dict[str, Any]:
        """{"name", "sha256", "bytes"} of the weights; 64 zeros unless `hashed` (reads them whole).

        Shards count as one file, in the order of their names.
        """
        files = self.weights.files
        digest = hashlib.sha256()
        for path in files if hashed else ():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return {
            "name": files[0].name if len(files) == 1 else self.path.name,
            "sha256": digest.hexdigest() if hashed else NO_DIGEST,
            "bytes": sum(path.stat().st_size for path in files),
        }

    def _names(self, prefix: str) -> list[str]:
        start, ignored = f"{prefix}.", set(self.ignored)
        return [n[len(start) :] for n in self.weights if n.startswith(start) and n not in ignored]


@dataclass(frozen=True)
class Family:
    """A row of the detection table."""

    name: str
    looks_for: str  # for the message that nothing was recognised
    recognises: Callable[[Found], bool]
    read: Callable[[Found], Checkpoint]


@dataclass(frozen=True, eq=False)
class Found:
    """What lies at the path that the user gave, before any family has claimed it."""

    path: Path  # a folder, or one weight file

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.yaml of the folder, or beside the file; None if there is none."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_CONFIG:
            raise FormatError(
                f"{path} has {path.stat().st_size} bytes; expected at most {MAX_CONFIG}"
            )
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            _expect_finite(found)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not YAML: {one_line(error)}") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if not isinstance(found, dict):
            what = "empty" if found is None else f"a {type(found).__name__}"
            raise FormatError(f"{path} is {what}; expected the sections model, vae, conditioner")
        return found

    @cached_property
    def pipeline(self) -> dict[str, Any] | None:
        """`args` of a folder's pipeline.json, as TRELLIS has one; None if there is none."""
        path = self.path / "pipeline.json"
        if not path.is_file():
            return None
        args = read_json(path).get("args")
        return args if isinstance(args, dict) else {}

    @cached_property
    def weights(self) -> Weights:
        """The weights, with names that start in model., vae. or conditioner."""
        weights = open_weights(self._weight_file())
        # DeepSpeed wraps modules; old training checkpoints still say so.
        weights = weights.renamed(lambda name: name.replace("_forward_module.", ""))
        if not any(name.startswith(("model.", "vae.", "conditioner.")) for name in weights):
            weights = weights.renamed("model.{}".format)  # a bare DiT
        return weights

    def _weight_file(self) -> Path:
        return self.path if self.path.is_file() else weight_file(self.path)

    def target(self, section: str = "model") -> str:
        """Last part of the class that config.yaml names for a section, "" if it names none."""
        found = (self.config or {}).get(section)
        target = found.get("target") if isinstance(found, dict) else None
        return target.rsplit(".", 1)[-1] if isinstance(target, str) else ""

    def params(self, section: str) -> dict[str, Any]:
        """`params` of one section of config.yaml; {} where the section has none."""
        found = (self.config or {}).get(section) or {}
        params = found.get("params") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(params, (dict, type(None))):
            raise FormatError(
                f"{self.folder / 'config.yaml'}: section {section} is not target and params"
            )
        return params or {}

    def listing(self) -> str:
        """A few of the names in the folder."""
        return listing(self.folder)


def _expect_finite(found: Any) -> None:
    """ValueError for aliases of aliases ("a billion laughs"): small in memory, endless in words."""
    waiting, entries = [found], 0
    while waiting:
        value = waiting.pop()
        entries += 1
        if entries > MOST:
            raise ValueError(f"more than {MOST} entries, aliases resolved")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def listing(folder: Path) -> str:
    """A few of the names in a folder."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return some(names, 6) if names else "nothing"


def weight_file(folder: Path) -> Path:
    """The weights in a folder: by their usual names, else the only candidate. UserError."""
    for name in ("model.fp16", "model", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        for suffix in (".safetensors", INDEX, ".ckpt"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    for suffixes in ((INDEX,), (".safetensors",), PICKLED):
        found = sorted(p for p in folder.iterdir() if p.name.endswith(suffixes))
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"{folder} holds no weights: looked for model.fp16.safetensors, model.safetensors, "
        f"diffusion_pytorch_model.safetensors, a shard index or a .ckpt, found {listing(folder)}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, such as a diffusers config.json. UserError, FormatError."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}; expected an object of settings")
    return found


class Params:
    """Hyper-parameters from a config file, taken one by one and checked."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise FormatError(f"{where}: a {type(values).__name__}; expected settings by name")
        self.values, self.where, self.taken = values, where, set[str]()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value as `kind` (int, float, bool, str); FormatError where missing or of another."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is None:
            raise FormatError(f"{self.where}: {name} is missing")
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise FormatError(f"{self.where}: {name} is {value!r}; expected a {kind.__name__}")
        if kind is float and not 0 <= abs(value) <= 1e9:
            raise FormatError(f"{self.where}: {name} is {value!r}; expected at most 1e9")
        return kind(value)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to a million."""
        value = self.take(name, int, default)
        if not least <= value <= 1_000_000:
            raise FormatError(f"{self.where}: {name} is {value}; expected {least} to 1000000")
        return value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Of layers, from `least` to a thousand: each is a module, and takes 1 ms to make."""
        value = self.size(name, default, least)
        if value > 1000:
            raise FormatError(f"{self.where}: {name} is {value}; expected at most 1000")
        return value

    def drop(self, *names: str) -> None:
        """Known, and without any effect on the network."""
        self.taken.update(names)

    def done(self) -> None:
        """FormatError for values that nobody took: they might change the network.

        One that is switched off (null, false, 0, "", empty) cannot, whatever it is.
        """
        unknown = sorted(str(key) for key in self._left() if self.values[key])
        if unknown:
            raise FormatError(
                f"{self.where}: unknown {some(unknown)}; known are {', '.join(sorted(self.taken))}"
            )

    def left(self) -> tuple[str, ...]:
        """Values that nobody took, in words, where the tensors tell enough: for parts whose
        released configurations carry settings of training and export. Not _class_name and the
        like, which diffusers writes for itself."""
        left = {str(key): key for key in self._left() if not str(key).startswith("_")}
        short = {name: repr(self.values[key])[:40] for name, key in left.items()}
        return tuple(f"{self.where}: {key} = {value}" for key, value in sorted(short.items()))

    def _left(self) -> set[Any]:
        return set(self.values) - self.taken


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors, without memory for them."""
    with torch.device("meta"):
        module = build()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def network_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    return shapes_of(lambda: network_of(config))


def check_part(
    weights: Weights,
    part: str,
    expected: Mapping[str, tuple[int, ...]],
    where: Path,
    ignored: Iterable[str] = (),
) -> None:
    """FormatError unless the part's floating-point tensors are exactly the expected ones.

    One line with how many are missing, unexpected and of another shape, and the first of each.
    """
    prefix, skip = f"{part}.", set(ignored)
    found = {n[len(prefix) :]: n for n in weights if n.startswith(prefix) and n not in skip}
    missing = [prefix + name for name in expected if name not in found]
    unexpected = [full for name, full in found.items() if name not in expected]
    misshaped = [
        f"{full} {list(weights.shape(full))}, expected {list(expected[name])}"
        for name, full in found.items()
        if name in expected and weights.shape(full) != tuple(expected[name])
    ]
    whole = [f for f in found.values() if not weights.dtype(f).is_floating_point]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("not floating point", whole),
        )
        if names
    ]
    if problems:
        raise FormatError(
            f"{where}: the {part}.* tensors do not fit its configuration; {'; '.join(problems)}"
        )
