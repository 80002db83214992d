"""Writing files so that a kill at any moment leaves the old or the new content, never half."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from draft_opd.utils.errors import UserError, one_line


def make_folder(path: Path) -> Path:
    """Creates a folder (and its parents); `UserError` when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder '{path}' ({error.strerror})") from error
    return path


def lock_folder(folder: Path) -> BinaryIO:
    """Keeps other processes that ask for it out of a folder until what is returned is closed; a
    killed one lets go.

    Raises `UserError` where another process is in it, or it cannot be written.
    """
    try:
        file = open(folder / ".lock", "ab")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UserError(f"cannot write into '{folder}' ({error.strerror})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"another process is writing into '{folder}': wait until it has ended, or choose another folder"
        ) from None
    except (AttributeError, OSError):  # no locks in this system, or on this disk
        pass
    return file


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:  # some systems do not open folders
        return
    try:
        os.fsync(number)
    except OSError as error:  # some disks do not sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def append(
    file: io.FileIO,
    content: bytes,
    path: Path,
    then: str = "go on with the same command",
    wait: bool = True,
) -> None:
    """Adds to an unbuffered file that is open for appending: all of it, or none.

    wait: until it is on the disk. Raises `UserError` where there is no room; `then` is what to do
    once there is.
    """
    size, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(content):
            written += os.write(file.fileno(), content[written:])
        if wait:
            os.fsync(file.fileno())
    except OSError as error:
        os.ftruncate(file.fileno(), size)
        raise UserError(
            f"cannot write '{path}' ({error.strerror}); what was written before is kept: make room and {then}"
        ) from error


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Writes beside, syncs, renames. Raises `UserError` where the place cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # others may write it too
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write '{path}' ({error.strerror})") from error


def write_bytes(path: Path, content: bytes) -> None:
    write_parts(path, [content])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A line each, as they come."""
    write_parts(path, (f"{line}\n".encode() for line in lines))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises `UserError` for a file that is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not readable JSON ({one_line(error)})") from None


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover_folder(folder: Path) -> None:
    """Puts the old content back when a kill came between the two renames of `replace_folder`."""
    if not folder.exists() and _old(folder).exists():
        os.replace(_old(folder), folder)


@contextmanager
def replace_folder(folder: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when the block ends well.

    The old content goes to `keep`, or away. Raises `UserError` where nothing can be written.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    if keep is None:
        recover_folder(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    old = keep or _old(folder)
    try:
        temporary.mkdir()
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            old.parent.mkdir(exist_ok=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync(folder.parent)
        if keep is None:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write '{folder}' ({reason})") from error
    finally:
        if keep is None:
            recover_folder(folder)
        shutil.rmtree(temporary, ignore_errors=True)
