"""Numbers and patterns of adapter files, checked before anything is computed with them.

An alpha may be any JSON or any tensor, and PEFT's patterns are regular expressions: one of exponential time
would never end.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from flux.errors import FluxError
from flux.jsonfiles import number as number
from flux.jsonfiles import positive as positive
from flux.jsonfiles import shown

MAX_SIDE = 2**17  # rows or columns of a layer's change; FLUX.1's widest layer has 21,504
MAX_ELEMENTS = 2**28  # of a layer's change when it is multiplied out; FLUX.1's largest has 6.6e7
MAX_NAMES, MAX_PATTERNS = 10_000, 200  # of a table: patterns that are names, and others
MAX_PATTERN = 512  # letters
MAX_TRIES = 10**7  # about so many steps a pattern may take at one name: a second
SECONDS = 2.0  # of the processor, for all patterns of a file at all its modules

# A pattern whose time has a bound: letters, classes and groups of these, and only the former repeated.
_ATOM = r"(?:\\[.dwDW_-]|\[[\w^.-]+\]|[\w.-])"
_GROUP = rf"\((?:\?:)?{_ATOM}+(?:\|{_ATOM}+)*\)\??"
_SEQUENCE = rf"\^?(?:{_GROUP}|{_ATOM}[*+?]?)*\$?"
SAFE = re.compile(rf"{_SEQUENCE}(?:\|{_SEQUENCE})*")
PLAIN = re.compile(r"[\w.-]+")


def scalar(tensor: mx.array, what: str) -> float:
    """The one number in a tensor, of any type but bool. FluxError for several, none, NaN or infinity."""
    if tensor.size != 1 or tensor.dtype in (mx.bool_, mx.complex64):
        raise FluxError(
            f"{what} has the shape {tuple(tensor.shape)} and the type {_type(tensor)}; not a number"
        )
    return number(tensor.item(), what)


def floats(tensors: Mapping[str, mx.array]) -> None:
    """FluxError for matrices that are not floats or hold nothing, by their names."""
    for name, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise FluxError(f"{name} has the type {_type(tensor)}; it should hold floats")
        if tensor.size == 0:
            raise FluxError(f"{name} has the shape {tuple(tensor.shape)}: it holds nothing")


def _type(tensor: mx.array) -> str:
    return str(tensor.dtype).removeprefix("mlx.core.")


def size(shape: Sequence[int], what: str) -> None:
    """FluxError for the (out, in) of a change that no layer of FLUX.1 comes near to: small factors of an
    enormous product would take all of the memory.
    """
    if len(shape) != 2 or any(not 0 < side <= MAX_SIDE for side in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FluxError(f"{what}: a change of shape {tuple(shape)} fits no layer")


class Patterns:
    """PEFT's `alpha_pattern` or `rank_pattern`: regular expression for a module's name, or its end -> number.

    table: as the config has it. what: its name, for errors. FluxError for anything but such a table, for a
    value that is not a number, and for patterns that may take very long.
    """

    def __init__(self, table: Any, what: str):
        if not isinstance(table, Mapping) or len(table) > MAX_NAMES:
            raise FluxError(f"{what} should be an object of at most {MAX_NAMES} patterns")
        self._what = what
        self._values = [number(value, f"{what}[{shown(key)}]") for key, value in table.items()]
        self._seconds = SECONDS
        # Nearly all are names, whose dots stand for themselves.
        self._plain = {key: i for i, key in enumerate(table) if PLAIN.fullmatch(key)}
        others = {key: i for i, key in enumerate(table) if key not in self._plain}
        if len(others) > MAX_PATTERNS:
            raise FluxError(
                f"{what} has {len(others)} patterns that are not names; {MAX_PATTERNS} are the most"
            )
        self._compiled = [(i, self._compile(key)) for key, i in others.items()]

    def find(self, *modules: str) -> float | None:
        """The number of the first pattern that fits one of a module's names as PEFT matches it, or None."""
        ends = [".".join(parts[i:]) for m in modules for parts in [m.split(".")] for i in range(len(parts))]
        none = len(self._values)
        first = min((self._plain[end] for end in ends if end in self._plain), default=none)
        for i, pattern in self._compiled:
            if i < first and self._fits(pattern, modules):
                return self._values[i]
        return self._values[first] if first < none else None

    def _fits(self, pattern: re.Pattern, modules: Sequence[str]) -> bool:
        start = time.thread_time()
        fits = any(map(pattern.match, modules))
        self._seconds -= time.thread_time() - start
        if self._seconds < 0:
            raise FluxError(f"{self._what} takes more than {SECONDS:g} s to match: its patterns are too slow")
        return fits

    def _compile(self, pattern: str) -> re.Pattern:
        alternatives = [group.count("|") + 1 for group in re.findall(r"\([^)]*\)\??", pattern)]
        tries = math.prod(alternatives) * 100 ** len(re.findall(r"(?<!\()[*+?]", pattern))
        if len(pattern) > MAX_PATTERN or not SAFE.fullmatch(pattern) or tries > MAX_TRIES:
            raise FluxError(f"{self._what}: the pattern {shown(pattern)} is not one that is safe to match")
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise FluxError(f"{self._what}: {shown(pattern)} is not a regular expression: {error}") from None
