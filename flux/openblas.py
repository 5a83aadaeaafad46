"""A faster matrix product for MLX's CPU backend on Linux.

The `mlx-cpu` wheel links a reference BLAS. The dynamic linker takes the first `cblas_sgemm` it meets, so an
OpenBLAS that is in the process before `mlx.core` serves MLX instead: 4 -> 250 GFLOPS in float32 on two cores.
"""

import ctypes
import sys


def preload() -> bool:
    """Put OpenBLAS (Debian: `libopenblas0-pthread`) into the process; returns whether it serves MLX.

    Does nothing on macOS, where MLX has other kernels, nor where the library is absent or `mlx.core` is
    already imported: everything works there too, slower on a Linux CPU.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
