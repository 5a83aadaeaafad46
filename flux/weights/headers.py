"""What a file of tensors says it holds: its names, types and shapes, and where the bytes begin."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type in the format's words, its shape, where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
