"""Files that are either the old one or the new one, whole: never half, whatever ends the program.

    write to a temporary file in the same folder, flush it to disk, rename it over the target

Symbolic links and other special files are refused: a name that someone else can redirect is not written
to, nor read from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a pipe without a writer would wait for ever
BINARY = getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; when the block ends without an error it becomes `path`.

    :raises OSError: if `path` is a folder, a link or a special file, or its folder cannot be written to;
        `path` is then as before, and nothing is left behind.

    Example::

        with replacing("figure.png") as temporary:
            figure.savefig(temporary, format="png")
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise the OSError that writing to `path` would raise, by making and removing a temporary file."""
    _temporary(Path(path)).unlink()


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file. Raises OSError for a link, a folder or a special file."""
    _refuse_special(Path(path))
    descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_WAIT | BINARY)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return file.read()


def _temporary(path: Path) -> Path:
    """An empty file beside `path`, made exclusively: its name cannot be a link that someone has put there."""
    _refuse_special(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise type(error)(error.errno, f"cannot be written to ({reason})", str(path)) from None
    return temporary


def _refuse_special(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed; give the file itself", str(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
