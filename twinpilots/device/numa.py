"""Where memory lies on a machine with several NUMA nodes.

Owns one system call: `mbind`. Knows nothing of what the memory holds, nor of who reads it.

Pages are interleaved over the nodes of the cores that read them. Chunks of work are dealt as they come, so no row has a reader of its own that a first
touch could favour; interleaved, every core reads from all memory controllers at once, whatever chunk it gets, and so does the link to a GPU. With the
policy set before the first touch, neither the threads that load weights nor a device's process, which maps the same file, can move them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from collections.abc import Sequence

_MBIND = {"x86_64": 237, "aarch64": 235}  # no C library but libnuma has a wrapper
_MPOL_INTERLEAVE = 3
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_LOG = logging.getLogger(__name__)


def interleave(address: int, num_bytes: int, nodes: Sequence[int]) -> bool:
    """Deal the pages of this range, none of them touched yet, to ``nodes`` in turn. Where the kernel refuses, they come from the node of whoever
    touches them first, which is said; False then. No nodes: nothing is done."""
    call = _MBIND.get(platform.machine())
    if not nodes or call is None:
        return False
    words = (ctypes.c_ulong * (max(nodes) // _WORD_BITS + 1))()
    for node in nodes:
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (start, address + num_bytes - start, _MPOL_INTERLEAVE, ctypes.addressof(words), len(words) * _WORD_BITS + 1, 0)  # the kernel drops one bit
    if libc.syscall(ctypes.c_long(call), *(ctypes.c_ulong(argument) for argument in arguments)) == 0:
        return True
    reason = os.strerror(ctypes.get_errno())
    _LOG.warning("memory cannot be dealt to NUMA nodes %s (%s): one node may hold it all; allow mbind (containers: --cap-add SYS_NICE)", list(nodes), reason)
    return False
