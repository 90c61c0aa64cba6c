"""What becomes of freed memory on a CPU: kept for the next tensor, or given back to the kernel."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the kernel; True where that was possible.

    Every activation above 128 KiB is otherwise a fresh mmap whose pages the kernel zeroes at first touch: on a 2-core
    virtual machine a training step of Wan-mini took 230 ms a clip with this and 420–1880 ms without (docs/log.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and others
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)))


def give_back_freed_memory() -> None:
    """Return what is freed so far to the kernel, where glibc can: memory used again would otherwise not be seen to rise."""
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
