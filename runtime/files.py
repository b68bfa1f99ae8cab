"""Writes files atomically, and checks early whether a path can be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vitapack.runtime.errors import UserError


def destination(final: str | os.PathLike[str]) -> Path:
    """Returns the path that a result will be written to, with links resolved.

    Call it before hours of work rather than after: it leaves nothing behind, no folder either.
    Raises UserError if the path cannot be written.
    """
    parent = Path(os.path.realpath(final)).parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    path, temporary = _temporary_for(final)
    temporary.unlink()
    for folder in made:
        folder.rmdir()
    return path


def _temporary_for(final: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The resolved path, and an empty temporary file in its folder. Raises UserError."""
    try:
        path = Path(os.path.realpath(final))
        if path.exists() and not path.is_file():
            # A rename would replace it by a file: root with `-o /dev/null` would break the system.
            kind = "a folder" if path.is_dir() else "a device or a pipe"
            raise UserError(f"cannot write {final}: it is {kind}; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}; choose another place") from error
    os.close(handle)
    return path, Path(name)


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path next to `final`; renames it to `final` only if the block succeeds.

    A crash, a full disk or Ctrl-C leaves nothing under the final name, and an older file of that
    name unchanged. The temporary file keeps the suffix of `final`, since exporters choose their
    format by it. Raises UserError if the folder cannot be written to or the disk is full.
    """
    path, temporary = _temporary_for(final)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private (0600); a result is an ordinary file under the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror or error}; free some space or choose another "
            "place (nothing was left under that name)"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
