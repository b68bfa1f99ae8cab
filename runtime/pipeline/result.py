"""One generation's result: the mesh, and everything that is reported about it."""

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
    """A mesh, how it was made and what that took."""

    mesh: Mesh  # its metadata state model, seed and sampler
    seed: int
    settings: SamplerDefaults  # that it was sampled with
    seconds: Mapping[str, float]  # by phase
    bytes: Mapping[str, Mapping[str, int | None]]  # by phase: predicted, peak, reserved
    queries: int | None  # points at which the shape decoder was evaluated, if it chooses them
    file: Path | None = None  # the file that holds it, if there is one

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
            "bytes": {phase: dict(found) for phase, found in self.bytes.items()},
            "queries": self.queries,
        }

    def describe(self) -> str:
        """One line for people: seconds, memory and topology."""
        mesh = self.report
        most = {
            key: max(found[key] or 0 for found in self.bytes.values())
            for key in ("peak", "predicted", "reserved")
        }
        return (
            f"{self.file or 'mesh'}  {sum(self.seconds.values()):.1f} s{memory_words(most)}; "
            f"{mesh.faces} faces, {'watertight' if mesh.watertight else 'not watertight'}, "
            f"components {mesh.components}, Euler number {mesh.euler_number}, "
            f"volume {mesh.volume:.3g}"
        )
