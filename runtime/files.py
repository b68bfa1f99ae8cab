"""Writes files atomically, and finds out early whether a place can be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vitapack.runtime.errors import UserError


def destination(final: str | os.PathLike[str]) -> Path:
    """The file that a result will be written to, links followed. UserError where none can be.

    To be asked before hours of work rather than after: nothing is left there, no folder either.
    """
    parent = Path(os.path.realpath(final)).parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    place, temporary = _beside(final)
    temporary.unlink()
    for folder in made:
        folder.rmdir()
    return place


def _beside(final: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The final place, and an empty temporary file in its folder. UserError."""
    try:
        place = Path(os.path.realpath(final))
        if place.exists() and not place.is_file():
            # A rename would put a file there: `-o /dev/null`, by root, takes it from everybody.
            what = "a folder" if place.is_dir() else "a device or a pipe"
            raise UserError(f"cannot write {final}: it is {what}; name a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{place.stem[:40]}-", suffix=place.suffix, dir=place.parent
        )
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}; choose another place") from error
    os.close(handle)
    return place, Path(name)


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `final`; renames it onto `final` only if the block succeeds.

    A crash, a full disk or Ctrl-C leaves nothing under the final name, and an older file of that
    name stays as it was. The temporary file keeps the suffix of `final`, since exporters choose
    their format by it. Raises UserError where the folder cannot be written to or the disk is full.
    """
    place, temporary = _beside(final)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private (0600); a result is an ordinary file under the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(place)
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror or error}; free some space or choose another "
            "place (nothing was left under that name)"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
