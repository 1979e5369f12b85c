"""What a process does with the memory it frees."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep freed buffers for the next step instead of giving them back; True where that can be asked for.

    glibc maps every buffer of more than 32 MB afresh and unmaps it when it is freed. On a CPU that is each activation
    of each step, and the system clears and maps it again page by page: the tiny ViT's step on 256 images took 1.09 s
    so and 0.74 s without (two cores, medians of three). Costs the peak: a process never shrinks again.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    # one arena, as a second one could not grow beyond 64 MB without maps
    return all(mallopt(key, value) == 1 for key, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
