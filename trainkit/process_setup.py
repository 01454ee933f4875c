"""Import this before torch: how a training process uses the machine it is on.

Threads that wait for each other sleep instead of spinning. On cores that loading processes or other users need too,
OpenMP threads that spin keep the very thread they wait for from running: a training step on two busy cores took ten
times as long. OpenMP reads its environment once, when torch loads it; a value that is already set is left alone.

Memory that tensors free stays with the process (mallopt(3), where the C library is glibc). Otherwise every large tensor
comes as new pages from the system, which clears them one by one: a detector's step on two cores takes 1.3 times as
long. The process holds on to the most it ever needed, about a tenth more.
"""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
with contextlib.suppress(AttributeError):  # musl has no mallopt
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 2**30)  # tensors up to 1 GiB come from the heap,
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # whose free end goes back to the system when it is 2 GiB
