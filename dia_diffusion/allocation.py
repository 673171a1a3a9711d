"""How a process that computes on CPUs gets its memory."""

import ctypes
import sys

# Of glibc's mallopt, see malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets the process use large blocks again that it has freed, where the C library is glibc.

    By itself glibc takes each block above 32 MiB from the kernel anew and gives it back when it is freed. A training
    step frees and takes gigabytes of such activations, and the kernel clears every page of them.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, LARGEST)
