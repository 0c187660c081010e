"""The C allocator: let a worker keep freed memory for the next allocation, or give it back to the system.

A window of a tile with standard errors frees some 40 MiB and asks for the same again. By default glibc returns much of
that to the system and gets it back page by page, which takes a fifth of the time of such tiles (1,024 rows, 512 draws).
Chunks of shards (4 MiB) are also made in kept memory. Larger pieces are the business of
`nntk_dist.runtime.reused_memory`. What copies and gradients of a large model leave behind is given back: gigabytes in
blocks too small to be mapped, which glibc keeps.

Axes: none.
"""

import ctypes
import os
import platform

# See `man 3 mallopt`. Once one is set, the other no longer adapts itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20  # at the end of the heap
_MAPPED_BYTES = 32 << 20  # larger blocks never come from the heap; glibc allows no higher threshold
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB of freed memory for its next allocations.

    Returns:
        Whether it does: not with another C library than glibc, nor if the environment sets one of these thresholds.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES), libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)])


def give_back_freed_memory() -> bool:
    """Give the system back the pages that this process has freed.

    Returns:
        Whether there were any; never with another C library than glibc.
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).malloc_trim(0))
