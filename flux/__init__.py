"""FLUX.1 in Apple MLX. The public names; importing the package loads OpenBLAS on Linux and nothing else."""

from flux.interrupts import end_silently
from flux.openblas import preload
from flux.version import __version__

__all__ = ["FluxPipeline", "Guide", "Nag", "__version__"]

end_silently()  # in our programs, while they import the rest
preload()  # must come before the first import of mlx.core


def __getattr__(name: str) -> object:
    """The names that need MLX, imported when they are first asked for."""
    if name == "FluxPipeline":
        from flux.pipeline import FluxPipeline

        return FluxPipeline
    if name == "Guide":
        from flux.conditioning import Guide

        return Guide
    if name == "Nag":
        from flux.models.nag import Nag

        return Nag
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
