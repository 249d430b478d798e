"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from guardspace_kernels.arguments import check_replaceable
from guardspace_kernels.arguments import path as checked_path


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write`` with a new open file, then gives it the name ``path``; creates missing parent folders.

    Whatever happens, a power loss included, ``path`` holds what was there before or the whole new content. The mode is
    that of any new file (0666 without the umask). A symbolic link at ``path`` is replaced: what it points to stays as
    it is. Of several writers of one path, one whole result wins.

    Raises:
        IsADirectoryError: ``path`` is a folder. OSError: no space or no permission, with the path in its message.
    """
    with staged(checked_path("path", path)) as new:
        write(new.file)
        new.flush()
        new.rename()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As :func:`write_atomic`, in UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """As :func:`write_atomic`, valid JSON whatever the numbers.

    JSON has none for NaN and infinity. They are the strings "NaN" and "Infinity", which no comparison with a bound
    takes for a small number, as several languages do with null.
    """
    write_text(path, json.dumps(_finite(value), indent=indent, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Staged:
    """A file that has no name of its own yet. Its writer holds a lock on it for as long as it lives, so that what
    killed writers left behind can be told from what others are writing."""

    def __init__(self, target: Path) -> None:
        self.target = target
        while True:
            # Unpredictable, and never a file or a link that exists: in a shared folder both may be others'.
            self.temporary: Path | None = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with suppress(FileExistsError):
                descriptor = os.open(self.temporary, flags, 0o666)
                _lock(descriptor, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # removed by another writer, before the lock
                    if os.path.samestat(os.stat(self.temporary), os.fstat(descriptor)):
                        self.file: BinaryIO = os.fdopen(descriptor, "w+b")
                        return
                os.close(descriptor)

    def flush(self) -> None:
        """Onto the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def rename(self) -> None:
        assert self.temporary is not None
        os.replace(self.temporary, self.target)
        self.temporary = None
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Nothing after :meth:`rename`."""
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written before cannot be now
            self.file.close()


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Staged]:
    """A new file beside ``path``, gone at the end of the context unless it was renamed."""
    target = Path(path)
    new = None
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, a file was to be written", os.fspath(path))
        check_replaceable("path", os.fspath(path))
        _make_folder(target.parent)
        _remove_abandoned(target)
        new = Staged(target)
        yield new
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        if new is not None:
            new.discard()


@contextmanager
def locked(folder: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Within the context no other process or thread is in one for this folder, but for shared ones among themselves.

    On file systems without locks there is none, and each file of the folder is whole all the same.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            _lock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile would keep it
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that have nothing to flush
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    """Whether the file system has locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        sync_folder(one.parent)


def _remove_abandoned(target: Path) -> None:
    """Removes the temporary files of this target whose writers are gone; the name has a process's number in earlier
    versions."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(\d+|[0-9a-f]{{16}})\.tmp")
    for path in [target.with_name(entry) for entry in os.listdir(target.parent) if name.fullmatch(entry)]:
        with suppress(OSError):  # another writer was quicker, it is alive, or the file is not ours to remove
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink()
            finally:
                os.close(descriptor)
