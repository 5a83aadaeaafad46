"""The version of this program. It stands here alone: the package, its pictures and its adapters read it."""

__version__ = "0.3.0"
