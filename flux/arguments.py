"""What the programs' command lines have in common: types of arguments, and errors of one line."""

import argparse
import math
from pathlib import Path
from typing import NoReturn

from flux.errors import FluxError


class Parser(argparse.ArgumentParser):
    """Wrong arguments are bad input like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise FluxError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def finite(text: str) -> float:
    """A number that is neither infinite nor none."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return number


def size(text: str) -> tuple[int, int]:
    """(height, width) of "256x512", or of "256" for a square."""
    height, _, width = text.lower().partition("x")
    try:
        return count(height), count(width or height)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 256x512, not {text}") from None


def adapter(text: str) -> tuple[str, float]:
    """(file, strength) of "a.safetensors:0.8", where 0.8 may be left out and is then 1."""
    file, colon, number = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:  # what is no number belongs to the file's name
        return file, finite(number)
    except ValueError:
        if Path(file).exists() and not Path(text).exists():
            message = f"the strength of {file} must be a number, not {number!r}"
            raise argparse.ArgumentTypeError(message) from None
        return text, 1.0
