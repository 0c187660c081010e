"""What the C allocator of a worker does with memory that is freed: it keeps some, where glibc would hand it back.

A window of a tile with standard errors frees some 40 MiB and asks for the same again. By default glibc gives much of
that back to the system and takes it anew, page by page: a fifth of the time of such tiles (1,024 rows, 512 draws).

Axes: none.
"""

import ctypes
import os
import platform

# Of `man 3 mallopt`: where the one is set, the other no longer adapts itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20  # at the end of the heap
_MAPPED_BYTES = 32 << 20  # and more, at once, never come from the heap: the most that glibc takes
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB for its next allocations; whether it does.

    Not where another C library is at work, or where the environment sets one of these thresholds itself.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES), libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)])
