"""Whether a data set fits in memory as one tensor, asked before decoding it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lib.system.errors import CompanionError

# The tensor itself, one copy in passing while it is normalised, and the decoded bytes.
COPIES = 2.25


def check_fits(name: str, shape: tuple[int, ...]) -> None:
    """Refuse to decode images of ``shape`` (N, c, h, w) to float32 if the machine cannot hold them."""
    needed, present = COPIES * 4 * math.prod(shape), memory()
    if needed > present:
        raise CompanionError(
            f"{name}: {shape[0]} images at {shape[-1]} px need {needed / 2**30:.0f} GiB in memory, this machine has "
            f"{present / 2**30:.0f} GiB; pass a smaller size=, or read it in batches with lib.data.stream"
        )


def memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or less inside a container with a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(file).read_text().strip() if Path(file).is_file() else "max"
        total = min(total, int(limit)) if limit.isdigit() else total
    return total
