"""An append-only journal of measurements: a killed run loses only its unfinished jobs.

    journal = Journal(path, key="3f0a...", resume=True)
    if task not in journal: journal.add(task, record)

One JSON object per line: first the key (a hash of model and settings), then the records.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vitapack.runtime.errors import UserError


class Journal:
    """Records by job name. A half-written last line, which a killed run leaves, is cut off."""

    def __init__(self, path: Path, key: str, *, resume: bool) -> None:
        """Opens the file; without `resume` it starts empty.

        Raises UserError if the journal to resume has another key, or if it cannot be written.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep = self._read(key) if resume and path.exists() else 0
            self._file = path.open("r+b" if keep else "wb")
            self._file.truncate(keep)
            self._file.seek(keep)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        if not keep:
            self._append({"key": key})

    def _read(self, key: str) -> int:
        """Fills `records` and returns the size in bytes of the file's complete lines."""
        raw = self.path.read_bytes()
        keep = 0
        for line in raw.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            if keep == 0 and entry.get("key") != key:
                raise UserError(
                    f"{self.path} was written for another model or other settings; "
                    "delete it, run without --resume, or choose another output file"
                )
            if keep:
                self.records[entry["task"]] = entry["record"]
            keep += len(line)
        return keep

    def __contains__(self, task: str) -> bool:
        return task in self.records

    def __getitem__(self, task: str) -> dict[str, Any]:
        return self.records[task]

    def add(self, task: str, record: dict[str, Any]) -> None:
        """Appends a record; it is on disk (fsync) when this returns."""
        self._append({"task": task, "record": record})
        self.records[task] = record

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space and run again with "
                "--resume"
            ) from error

    def close(self) -> None:
        self._file.close()
