"""How the C library hands out memory: freed memory stays with the process, in large pages.

XLA's CPU programs ask `malloc` for their buffers in each call and free them after it. glibc gives large blocks back to
the kernel at once, which maps and zeroes them anew in the next call, 4 KiB at a time: in a training step of a DiT-S/2
that is more than 100,000 page faults. Importing the package therefore tells glibc, once, in this process:

- two arenas: the fewer there are, the more often a thread finds what another has freed; with only one, small
  steps became slower, whose allocations then search what tracing and compiling have left in the same heap;
- blocks of less than `OWN_MAPPING` come from that heap, and it is never trimmed. So the process keeps the memory of its
  peak, except for single blocks larger than that;
- the heap lies in large pages, as far as `RESERVED` goes: address space, which costs no memory until it is touched.

Nothing is done where there is no glibc, where the environment chooses already (`GLIBC_TUNABLES` or `MALLOC_…` name an
option of malloc), or with `DIFFUSION_JAX_MALLOC=system`. Figures: docs/performance.md.
"""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

OWN_MAPPING = 2**30
"""Blocks of at least this many bytes are mapped on their own and go back to the system when they are freed; glibc
before 2.35 takes no more than `OLD_OWN_MAPPING`."""

OLD_OWN_MAPPING = 2**25

ARENAS = 2

RESERVED = 0.5
"""Share of the machine's memory up to which the heap has large pages."""

SWITCH = "DIFFUSION_JAX_MALLOC"

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2**21


class Settings(NamedTuple):
    """own_mapping: see `OWN_MAPPING`, 0 where nothing was set. large_pages: bytes of heap that may have them."""

    own_mapping: int = 0
    large_pages: int = 0

    def __str__(self) -> str:
        if not self.own_mapping:
            return "as the system has it"
        return f"{ARENAS} arenas, {self.own_mapping >> 20} MiB kept, large pages for {self.large_pages >> 30} GiB"


_settings: Settings | None = None


def keep_freed_memory() -> Settings:
    """Sets glibc's options as the module says, the first time it is called, and tells what was set."""
    global _settings
    if _settings is None:
        _settings = Settings() if _chosen_already() else _set()
    return _settings


def _chosen_already() -> bool:
    choice = os.environ.get(SWITCH, "")
    tunables = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return choice == "system" or tunables or any(name.startswith("MALLOC_") for name in os.environ)


def _set() -> Settings:
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (musl and others have a mallopt of their own, or none)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return Settings()
    mallopt(_ARENA_MAX, ARENAS)
    own_mapping = next((size for size in (OWN_MAPPING, OLD_OWN_MAPPING) if mallopt(_MMAP_THRESHOLD, size)), 0)
    mallopt(_TRIM_THRESHOLD, -1)
    return Settings(own_mapping, _large_pages(libc, own_mapping))


def _large_pages(libc: ctypes.CDLL, own_mapping: int) -> int:
    """Extends the heap by address space that may have large pages; how many bytes."""
    try:
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return 0  # There, address space is counted as memory.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.sbrk.argtypes, libc.madvise.argtypes = [ctypes.c_ssize_t], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Blocks just under the threshold come from the end of the heap, one after the other; freed, they are its free end.
    blocks = [libc.malloc(own_mapping - 2**12) for _ in range(int(memory * RESERVED) // max(own_mapping, 1))]
    end = libc.sbrk(0) or 0
    inside = [block for block in blocks if block and block < end]
    reserved = 0
    if inside:
        start = -(-min(inside) // _LARGE_PAGE) * _LARGE_PAGE
        size = (end - start) // _LARGE_PAGE * _LARGE_PAGE
        reserved = size if size > 0 and libc.madvise(start, size, _MADV_HUGEPAGE) == 0 else 0
    for block in blocks:
        libc.free(block)
    return reserved
