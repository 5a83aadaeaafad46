"""What the programs have in common: how they end, types of arguments, prompts from files."""

import argparse
import errno
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from flux import images, interrupts, sampler
from flux.distributed.ranks import Ranks, print_error
from flux.errors import FluxError
from flux.jsonfiles import shown
from flux.step_cache import LEVELS

INTERRUPTED, UNREAD = 130, 141  # 128 and the signal's number: SIGINT, SIGPIPE
MOST = 10**7  # of anything that is counted: pixels of a side, steps, iterations
REFUSALS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)  # of standard output


def run_program(program: Callable[[Ranks], int]) -> int:
    """Run a program, alone or as a rank of mlx.launch's; its exit status.

    2 for bad input and for what the machine refuses, of which one line is printed; 130 when interrupted; 141,
    without a word, when nobody reads the output any more. Rank 0 alone prints and warns.
    """
    _open_streams()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        with interrupts.raised(), _flushed():
            return _run(program)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _discard_output()
        if error.errno == errno.EPIPE:
            return UNREAD
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


@contextmanager
def _flushed() -> Iterator[None]:
    """What the block prints is written when it ends, where an error can still be told."""
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(program: Callable[[Ranks], int]) -> int:
    ranks = None
    try:
        ranks = Ranks()
        ranks.silence_other_ranks()
        return program(ranks)
    except (FluxError, OSError, MemoryError, RuntimeError) as error:
        fault = _fault(error)
        if fault is None:
            raise
        print_error(fault, ranks)
        return 2


def _fault(error: Exception) -> FluxError | None:
    """The line for an error that a program can end with; None for one that is a defect."""
    if isinstance(error, FluxError):
        return error
    if isinstance(error, OSError):
        named = error.filename is not None and error.errno is not None
        return FluxError(f"cannot use {error.filename}: {error.strerror}") if named else None
    if isinstance(error, MemoryError) or re.search(r"\bm?alloc|allocate|out of memory", str(error), re.I):
        return FluxError(f"there is not enough memory for this: {str(error) or 'no more to be had'}")
    return None


def _open_streams() -> None:
    """Something for standard streams that are closed, as in `2>&-`: else print would take another one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (to the process's end)


def _discard_output() -> None:
    """Let what is still to be written go nowhere, also when Python ends, for streams that refuse it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def on_stop_signals(ask: Callable[[], None]) -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM call `ask`."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, lambda *_: ask())
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


LINE_END = re.compile(r"\r?\n")  # of prompts; str.splitlines also splits at form feeds and U+2028


class Parser(argparse.ArgumentParser):
    """Wrong arguments are bad input like any other: one line."""

    def error(self, message: str) -> NoReturn:
        """Raise FluxError instead of ending the process."""
        raise FluxError(f"{message} (see {self.prog} --help)")


def described(text: str | None) -> Parser:
    """A parser whose help begins with a module's docstring, as it stands there."""
    return Parser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """A whole number from 1 on, of things that there can be."""
    digits = text.strip()
    if not digits.isdecimal() or len(digits) > 20 or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text[:40]}")
    if int(digits) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, not {text}")
    return int(digits)


def finite(text: str) -> float:
    """A number that is neither infinite nor none."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return number


def cache_threshold(text: str) -> float:
    """A step cache's threshold: the name of a level, or a number."""
    try:
        return LEVELS[text] if text in LEVELS else float(text)
    except ValueError:
        names = ", ".join(LEVELS)
        raise argparse.ArgumentTypeError(f"must be {names} or a number, not {text[:40]}") from None


def size(text: str) -> tuple[int, int]:
    """(height, width) of "256x512", or of "256" for a square."""
    height, _, width = text.lower().partition("x")
    try:
        return count(height), count(width or height)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 256x512, not {text}") from None


def sides(text: str) -> str:
    """Pixels at a picture's sides: "top,right,bottom,left", or one number for each of them."""
    numbers = text.split(",")
    if len(numbers) not in (1, 4) or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f"must be TOP,RIGHT,BOTTOM,LEFT in pixels such as 0,256,0,256, or one number, not {text}"
        )
    values = [number.strip() for number in numbers] * (4 // len(numbers))
    if max(map(len, values)) > 5:
        raise argparse.ArgumentTypeError(f"must be less than 100000 pixels, not {text}")
    return ",".join(values)


def pixels(text: str) -> int:
    """A whole number of pixels, which may be negative."""
    number = int(text)
    if abs(number) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST} pixels, not {text}")
    return number


def padding(text: str) -> int | str:
    """Pixels around a mask, or "auto"."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of pixels or auto, not {text[:40]}")
    return text if text == "auto" else pixels(text)


def shift(text: str) -> str:
    """A time shift, as `flux.sampler.read_shift` reads it: "dev", "none" or a factor."""
    try:
        sampler.read_shift(text)
    except FluxError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def adapter(text: str) -> tuple[str, float]:
    """(file, strength) of "a.safetensors:0.8", where 0.8 may be left out and is then 1.

    The file may also be a folder, or on the Hub: "owner/name", "owner/name:file", "owner/name:file:0.8".
    """
    file, colon, number = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:  # what is not a number belongs to the file's name
        return file, finite(number)
    except ValueError:
        if Path(file).exists() and not Path(text).exists():
            message = f"the strength of {file} must be a number, not {number!r}"
            raise argparse.ArgumentTypeError(message) from None
        return text, 1.0


def cache_folder(text: str) -> str:
    """A folder that exists, or a path with a / for a new one: a prompt after the option is not meant."""
    if Path(text).is_dir() or ("/" in text and not Path(text).exists()):
        return text
    raise argparse.ArgumentTypeError(f"no folder is called {text!r}; a new one is written with a /: ./NAME")


def find_prompts(given: list[str], file: str | None, folder: str | None) -> list[str]:
    """The prompts of a command line, or of a file or a folder that it names; each as one line."""
    if sum(source is not None for source in (given or None, file, folder)) > 1:
        raise FluxError("prompts come from the command line, --prompts-file or --prompts, not from two")
    if folder is not None:
        return [read_prompt(path) for path in prompt_files(folder)]
    if file is not None:
        return read_prompts(file)
    return [" ".join(map(str.strip, LINE_END.split(prompt_text(prompt)))) for prompt in given]


def prompt_text(text: str) -> str:
    """A prompt of the command line as text. FluxError for bytes that are not UTF-8, which shells let pass.

    In a locale without UTF-8, Python hands over UTF-8 bytes one by one: they are put together.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise FluxError(f"the prompt {shown(text)} is not UTF-8 text; save the script in UTF-8") from None


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, one a line; of standard input where the name is "-"."""
    title = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        prompts = [line.strip() for line in LINE_END.split(data.decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError:
        raise FluxError(f"{title} is not UTF-8 text") from None
    except OSError as error:
        raise FluxError(f"cannot read the prompts' file {title}: {error.strerror}") from None
    if not prompts:
        raise FluxError(f"{title} holds no prompt; it should hold one a line")
    return prompts


def prompt_files(folder: str) -> list[Path]:
    """The .txt files of a folder, by name, without those of its sub-folders.

    FluxError where two of them would name the same picture, or one is a link out of the folder.
    """
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() == ".txt")
    except OSError as error:
        raise FluxError(f"cannot read the prompts' folder {folder}: {error.strerror}") from None
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    if not paths:
        raise FluxError(f"the prompts' folder {folder} holds no .txt file; it should hold one a prompt")
    for path in paths:  # a folder from a stranger: what a link leads to would be in the picture's metadata
        if path.resolve().parent != Path(folder).resolve():
            raise FluxError(f"{path} is a link to a file elsewhere: put a copy into the folder")
    names: dict[str, Path] = {}
    for path in paths:
        other = names.setdefault(path.stem.casefold(), path)  # some file systems take A.png for a.png
        if other is not path:
            raise FluxError(f"{other} and {path.name} would both be the picture {path.stem}.png: rename one")
    return paths


def read_prompt(path: Path) -> str:
    """The text of a file as one line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FluxError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise FluxError(f"cannot read the prompt {path}: {error.strerror}") from None
    if not text.strip():
        raise FluxError(f"{path} is empty; it should say what its picture shows")
    return " ".join(text.split())


def check_folder(output: str, name: str) -> None:
    """Raise FluxError where a picture of this name could not be written into the folder, or it be made."""
    folder = Path(output)
    is_picture = folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not folder.is_dir()
    if not output or folder.is_file() or is_picture:
        raise FluxError(f"--prompts needs a folder as --output, not {output or 'nothing'}")
    images.check_output((folder if folder.is_dir() else folder.parent) / f"{name}.png")
