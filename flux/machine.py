"""What the machine has: asked here, so that the networks need not know one."""

import os

import mlx.core as mx

from flux.errors import FluxError

UNKNOWN = 16 * 2**30  # bytes, where a system does not say
SHARE = 0.5  # of the memory that a decode may take: its caller may hold more than the autoencoder


def memory() -> int:
    """Bytes that the default device can work with.

    On Metal its recommended working set, on CUDA the GPU's memory, on a CPU the computer's.
    """
    info = mx.device_info(mx.default_device())
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if info.get(key):
            return int(info[key])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


def require(needed: int, what: str) -> None:
    """FluxError where `what` needs more bytes than there are."""
    if needed > (there := memory()):
        raise FluxError(
            f"{what} needs {needed / 1e9:,.0f} GB at least, and this machine has {there / 1e9:,.0f} GB; "
            f"make a smaller one"
        )


def autoencoder_memory() -> int:
    """Bytes that the autoencoder may take for a batch before it goes on in pieces."""
    return int(SHARE * memory())
