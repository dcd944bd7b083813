"""Memory of this process, as the system counts it."""

import resource
import sys


def peak_memory_bytes():
    """The largest resident memory of this process; the system counts in KiB, on macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
