"""Two folders that take each other's name in one step, so that there is always one of either name."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["exchange"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(left: Path, right: Path) -> None:
    """Exchange the names of two files or folders of one file system.

    In one step where the operating system can, as Linux does; else in three, between which one name is missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from shared.tables.exchange_names import exchange
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("old", "new"):
        ...     _ = (folder / name).write_text(name)
        >>> exchange(folder / "old", folder / "new")
        >>> (folder / "old").read_text()
        'new'
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        renameat2 = None
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(left))
    aside = right.with_name(f"{left.name}.old")
    os.rename(right, aside)
    try:
        os.rename(left, right)
        os.rename(aside, left)
    except BaseException:
        if aside.exists() and not right.exists():
            os.rename(aside, right)
        raise
