"""FLUX.1 in Apple MLX. The public names; importing the package loads OpenBLAS on Linux and nothing else."""

from flux.openblas import preload

preload()  # must come before the first import of mlx.core
