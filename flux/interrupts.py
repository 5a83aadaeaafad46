"""Ctrl-C while a program is imported, and when it has ended: it ends the process, without a traceback.

Between the two it is KeyboardInterrupt, as everywhere in Python: `flux.arguments.run_program` sees to that.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = ("txt2image", "dreambooth", "caption")  # also with flux- before it, where the package is installed


def end_silently() -> None:
    """From here on Ctrl-C ends the process at once, as it does with programs in C; in our programs alone."""
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raised() -> Iterator[None]:
    """Within the block Ctrl-C is KeyboardInterrupt, also after `end_silently`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_program() -> bool:
    """Whether Python was started with one of our programs; else Ctrl-C is the business of whoever imports."""
    name = Path(sys.argv[0]).stem if sys.argv else ""
    if name == "-m":  # Python's word for it while it looks for the module
        following = dict(zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
        return following.get("-m", "").startswith("flux.")
    return name.removeprefix("flux-") in SCRIPTS
