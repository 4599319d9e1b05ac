"""Keep large blocks of memory in the process instead of handing them back to the kernel after every operation."""

from __future__ import annotations

import ctypes
import platform
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_large_blocks() -> bool:
    """Tell glibc to reuse freed blocks up to 1 GiB; returns whether the setting was accepted.

    By default glibc maps every block above 32 MiB afresh and unmaps it when freed, so each large activation is faulted in
    page by page again and again: up to half the time of a training step on a CPU. The price is that resident memory stays at
    its peak. Does nothing where the C library is not glibc. Call it before the first large tensor.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
