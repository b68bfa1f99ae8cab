"""The result of one generation: the mesh and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vitapack.runtime.decode.mesh import Mesh, MeshReport, report
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.pipeline.phases import memory_words


@dataclass(frozen=True, eq=False)
class Generated:
    """A mesh with its settings, seconds and memory."""

    mesh: Mesh  # its metadata name model, seed and sampler
    seed: int
    settings: SamplerDefaults  # solver, steps and guidance of this generation
    seconds: Mapping[str, float]  # by phase
    bytes: Mapping[str, Mapping[str, int | None]]  # by phase: predicted, peak, reserved
    queries: int | None  # number of query points, if the decoder chooses them
    file: Path | None = None  # mesh file, if it was written

    @cached_property
    def report(self) -> MeshReport:
        """Topology and size of the mesh."""
        return report(self.mesh)

    def to_json(self) -> dict[str, Any]:
        """The row of `generate --json`."""
        row: dict[str, Any] = {} if self.file is None else {"file": str(self.file)}
        return row | {
            **self.mesh.metadata,
            "mesh": asdict(self.report),
            "seconds": dict(self.seconds),
            "bytes": {phase: dict(memory) for phase, memory in self.bytes.items()},
            "queries": self.queries,
        }

    def describe(self) -> str:
        """Seconds, memory and topology in one readable line."""
        mesh = self.report
        largest = {
            key: max(memory[key] or 0 for memory in self.bytes.values())
            for key in ("peak", "predicted", "reserved")
        }
        return (
            f"{self.file or 'mesh'}  {sum(self.seconds.values()):.1f} s{memory_words(largest)}; "
            f"{mesh.faces} faces, {'watertight' if mesh.watertight else 'not watertight'}, "
            f"components {mesh.components}, Euler number {mesh.euler_number}, "
            f"volume {mesh.volume:.3g}"
        )
