"""A queue of its own process: maps the memory file it inherited and serves one mailbox. Started by test_native_queue.py."""

from __future__ import annotations

import mmap
import sys

import numpy as np

from tests.cpu.native_twin import native


def main() -> None:
    fd, num_bytes, mailbox = (int(text) for text in sys.argv[1:4])
    host = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)
    gpu = np.zeros(num_bytes, np.uint8)
    sys.exit(native().queue_loop(host.ctypes.data, gpu.ctypes.data, mailbox) & 0xFF)


if __name__ == "__main__":
    main()
