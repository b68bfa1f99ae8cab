"""What a path given by the user holds, before a family has recognised it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.container import one_line, parse_json
from vitapack.runtime.loading.checkpoint_files import (
    INDEX,
    MOST,
    PICKLED,
    Weights,
    first_names,
    open_weights,
)

# A released config.yaml has 3 KB. PyYAML takes a second for 100 KB.
MAX_CONFIG = 1 << 20


@dataclass(frozen=True, eq=False)
class PathProbe:
    """A path given by the user: its folder's configuration and weights, read on first use."""

    path: Path  # a folder, or one weight file

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.yaml in the folder, or next to the file; None if there is none."""
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
            kind = "empty" if found is None else f"a {type(found).__name__}"
            raise FormatError(f"{path} is {kind}; expected the sections model, vae, conditioner")
        return found

    @cached_property
    def pipeline(self) -> dict[str, Any] | None:
        """`args` of the folder's pipeline.json (TRELLIS); None if there is none."""
        path = self.path / "pipeline.json"
        if not path.is_file():
            return None
        args = read_json(path).get("args")
        return args if isinstance(args, dict) else {}

    @cached_property
    def weights(self) -> Weights:
        """The weights; their names start with model., vae. or conditioner."""
        weights = open_weights(self._weight_file())
        # DeepSpeed wraps modules, which shows in old training checkpoints.
        weights = weights.renamed(lambda name: name.replace("_forward_module.", ""))
        if not any(name.startswith(("model.", "vae.", "conditioner.")) for name in weights):
            weights = weights.renamed("model.{}".format)  # a bare DiT
        return weights

    def _weight_file(self) -> Path:
        return self.path if self.path.is_file() else weight_file(self.path)

    def target(self, section: str = "model") -> str:
        """Last part of the class named for a section of config.yaml, "" if there is none."""
        found = (self.config or {}).get(section)
        target = found.get("target") if isinstance(found, dict) else None
        return target.rsplit(".", 1)[-1] if isinstance(target, str) else ""

    def params(self, section: str) -> dict[str, Any]:
        """`params` of one section of config.yaml, {} if it has none. Raises: FormatError."""
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
    """ValueError for aliases of aliases ("a billion laughs"): small in memory, endless as text."""
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
    return first_names(names, 6) if names else "nothing"


def weight_file(folder: Path) -> Path:
    """The weights in a folder: by their usual names, else the only candidate.

    Raises: UserError: if there is none, or more than one.
    """
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
    """A JSON object, such as a diffusers config.json. Raises: UserError, FormatError."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}; expected an object of settings")
    return found
