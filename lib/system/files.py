"""Where things lie, and writing so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.system.errors import CompanionError

ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """Folder of the content-keyed cache: ``$COMPANION_CACHE``, else ``.cache`` in the project."""
    return Path(os.environ.get("COMPANION_CACHE", ROOT / ".cache"))


def data_dir() -> Path:
    """Folder of downloaded data sets: ``$COMPANION_DATA``, else ``data`` in the project."""
    return Path(os.environ.get("COMPANION_DATA", ROOT / "data"))


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refusing a name that would leave the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CompanionError(f"the name {name!r} leaves its folder {folder}")
    return path


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success move it there in one step, on failure leave nothing behind.

    The data is forced to disk before the move, so a power cut leaves the old file or the new one, never a part. A full disk
    or a read-only folder raises :class:`CompanionError` naming the file.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: writers such as matplotlib choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # now: some writers put a file of their own in its place
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CompanionError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: Path | str, tensors: dict, header: dict[str, str] | None = None) -> None:
    """Write contiguous tensors by name and a header of strings as one safetensors file, atomically."""
    import safetensors.torch

    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=header)
        except safetensors.SafetensorError as error:  # its error for a full disk is no OSError
            raise OSError(str(error)) from error


def read_safetensors(path: Path | str) -> tuple[dict[str, str], dict]:
    """Header strings and tensors of a safetensors file, with one-line errors."""
    import safetensors

    if not Path(path).is_file():
        raise CompanionError(f"no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, struct.error) as error:
        raise CompanionError(f"{path} is damaged or no safetensors file: {error}") from error


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` atomically, UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
