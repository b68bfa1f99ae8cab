"""Writes a packed file so that an interrupted run can continue.

The folder `.NAME.partial/`, next to the final file, holds the unfinished file and a journal with
one line per finished tensor. A later run with the same plan keeps tensors whose bytes match the
journal line. The plan is identified by the file's header, which states the source's sha256, the
layer map, the quantizer and the layout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitapack.runtime.errors import UserError
from vitapack.runtime.files import destination
from vitapack.runtime.format.container import Layout, Writer
from vitapack.runtime.progress import Cancelled

try:
    import fcntl
except ImportError:  # Windows: two runs that write the same file are not detected
    fcntl = None  # type: ignore[assignment]


class PartialFile:
    """A file that is being filled; open it with `partial_file`."""

    def __init__(self, final: Path, layout: Layout, folder: Path) -> None:
        self.final = final
        data, journal = folder / "file", folder / "journal"
        data.touch()
        self.file = data.open("r+b")
        self.journal = journal.open("a+")
        if fcntl is not None:
            try:
                fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise UserError(f"{final}: another compression is writing it now") from None
        finished = self._finished(layout)
        if not finished:
            self.journal.truncate(0)
        self.writer = Writer(self.file, layout)
        self.writer.missing -= finished
        self.kept = frozenset(finished)

    def _finished(self, layout: Layout) -> set[str]:
        """Journalled tensors whose bytes match; none if the file was laid out for another plan."""
        if self.file.read(len(layout.header)) != layout.header:
            return set()
        self.journal.seek(0)
        names = set()
        for line in self.journal:
            checksum, _, name = line.rstrip("\n").partition(" ")
            info = layout.tensors.get(name)
            if info is None or not line.endswith("\n"):
                continue  # the last line of a killed run may be cut off
            self.file.seek(len(layout.header) + info.start)
            if f"{zlib.crc32(self.file.read(info.nbytes)):08x}" == checksum:
                names.add(name)
        return names

    def put(self, name: str, data: Any) -> None:
        self.writer.put(name, data)
        self.file.flush()
        self.journal.write(f"{zlib.crc32(data):08x} {name}\n")
        self.journal.flush()

    def publish(self) -> str:
        """Finishes the file and gives it its final name; returns the sha256 of its contents."""
        digest = self.writer.finish()
        os.fsync(self.file.fileno())
        Path(self.file.name).replace(self.final)
        return digest

    def close(self) -> None:
        self.file.close()
        self.journal.close()


@contextlib.contextmanager
def partial_file(final: Path, layout: Layout) -> Iterator[PartialFile]:
    """Opens the file to fill. Its folder is deleted when the run succeeds or fails; an interrupted
    run (Ctrl-C, cancellation, a killed process) leaves it for the next one. Raises UserError if the
    file cannot be written.
    """
    final = destination(final)
    folder = final.with_name(f".{final.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = PartialFile(final, layout, folder)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}; choose another place") from error
    try:
        yield partial
    except (KeyboardInterrupt, Cancelled):
        partial.close()
        raise
    except OSError as error:
        partial.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"cannot write {final}: {error.strerror or error}; free some space or choose another "
            "place (nothing was left under that name)"
        ) from error
    except BaseException:
        partial.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    partial.close()
    shutil.rmtree(folder, ignore_errors=True)
