"""The processes that mlx.launch starts: what they send each other, and how one that is lost ends them all.

A rank is a process; rank 0 is the one that prints and writes. Nothing here knows a model.
"""

import ctypes
import json
import math
import os
import platform
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from flux import __version__
from flux.errors import FluxError

Value = TypeVar("Value")
Item = TypeVar("Item")

# A rank that dies is noticed at once, because its connections close. These bounds, in seconds, are for a
# machine that vanishes without a word: how long the others wait for it while it should work, or download.
PATIENCE = 3600
DOWNLOAD = 24 * 3600
GRACE = 10  # seconds for MLX to say by itself that a connection is closed
MEETING = 60  # seconds for all ranks to start; the variable FLUX_MEETING_TIMEOUT says otherwise
LOST = "another rank has ended or cannot be reached"
HEAD = 40  # bytes that a message begins with
SHORT = 512  # bytes that go in a first message, of a length that all know
_NUMBERS = count()  # of this process's messages


class RanksError(FluxError):
    """A FluxError that every rank raises alike: to be printed once."""


class Ranks:
    """The group that this process is in; alone, a group of one.

    model_parallel: whether each rank has a part of the networks (`shard`) and all work on every item;
    otherwise each has whole networks, and the ranks share out the items of `map`.
    """

    def __init__(self):
        """FluxError where the other ranks cannot be reached, and where one has another version.

        Where some do not come, the process ends with one line that says so.
        """
        self.model_parallel = False
        seconds = _meeting_timeout()
        start = time.monotonic()
        self.group, self._links = _meet(seconds)
        self.rank, self.size = self.group.rank(), self.group.size()
        left = max(1.0, seconds - (time.monotonic() - start))
        self.agree({"version of flux-mlx": __version__, "version of mlx": mx.__version__}, left)

    @classmethod
    def alone(cls) -> "Ranks":
        """A group of this process alone, whatever mlx.launch has started."""
        ranks = cls.__new__(cls)
        ranks.model_parallel, ranks.rank, ranks.size = False, 0, 1
        return ranks

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any, patience: float = PATIENCE) -> list[Any]:
        """Every rank's value, by rank, on every rank. A value is what JSON can say."""
        return [value for value, _ in self._exchange(value, mx.zeros((0,), mx.uint8), patience)]

    def barrier(self, patience: float = PATIENCE) -> None:
        """Return when every rank has come here."""
        self.gather(None, patience)

    def _exchange(self, value: Any, content: mx.array, patience: float) -> list[tuple[Any, mx.array]]:
        """Every rank's value and bytes (n,), in one message if they are few, else in two."""
        if self.size == 1:
            return [(value, content)]
        words = json.dumps(value).encode()
        body = words + np.array(content).tobytes()
        # MLX's ring goes on after a rank has died, with whatever was in memory for its message, be it an
        # earlier one (0.32.4): so each has its number and sender, and check sums.
        number = next(_NUMBERS)
        head = struct.pack("<QQQQ", number, self.rank, len(words), content.size)
        head += struct.pack("<II", zlib.crc32(head), zlib.crc32(body))
        message = mx.array(np.frombuffer(head + body, np.uint8))
        with self.waiting(patience):
            rows = self._all_gather(message[:SHORT], SHORT)
            lengths = [self._length(row, number, rank) for rank, row in enumerate(rows)]
            if max(lengths) > SHORT:
                rows = self._all_gather(message, max(lengths))
        return [self._read(row[:length]) for row, length in zip(rows, lengths, strict=True)]

    def _length(self, row: bytes, number: int, rank: int) -> int:
        """Of a message, by its head."""
        *expected, words, content = struct.unpack("<QQQQ", row[:32])
        if zlib.crc32(row[:32]) != struct.unpack("<I", row[32:36])[0] or expected != [number, rank]:
            raise FluxError(f"{self._name()}: {LOST}")
        return HEAD + words + content

    def _read(self, row: bytes) -> tuple[Any, mx.array]:
        if zlib.crc32(row[HEAD:]) != struct.unpack("<I", row[36:HEAD])[0]:
            raise FluxError(f"{self._name()}: {LOST}")
        end = HEAD + struct.unpack("<Q", row[16:24])[0]
        return json.loads(row[HEAD:end]), mx.array(np.frombuffer(row[end:], np.uint8))

    def _all_gather(self, x: mx.array, length: int) -> list[bytes]:
        x = mx.pad(x, (0, length - x.size))
        return [bytes(row) for row in np.array(mx.distributed.all_gather(x[None], group=self.group))]

    def on_all_ranks(self, work: Callable[[], Value], patience: float = PATIENCE) -> Value:
        """Do the work; its result. If it raises FluxError on any rank, every rank raises the first of them.

        SystemExit, by which a parser ends after --help, likewise.
        """
        value, outcome = self._try(work)
        self._check(self.gather(outcome, patience))
        return cast(Value, value)  # no rank has raised

    def _try(self, work: Callable[[], Value]) -> tuple[Value | None, tuple]:
        """What work gives, and how it ended: (fault, exit status, host)."""
        try:
            return work(), (None, None, platform.node())
        except FluxError as error:
            return None, (str(error), None, platform.node())
        except SystemExit as error:
            return None, (None, error.code or 0, platform.node())

    def _check(self, outcomes: list[tuple]) -> None:
        """Raises what the first rank has raised, if any has."""
        for rank, (fault, status, host) in enumerate(outcomes):
            if status is not None:
                raise SystemExit(status)
            if fault is not None:
                raise RanksError(fault if rank == 0 else f"on rank {rank} ({host}): {fault}")

    def rank_zero_only(self, work: Callable[[], Value]) -> Value | None:
        """Do the work on rank 0 alone; its result there, None elsewhere. Its FluxError is raised on all."""
        return self.on_all_ranks(lambda: work() if self.is_rank_zero else None)

    @contextmanager
    def in_rank_zero(self, context: AbstractContextManager) -> Iterator[None]:
        """The block within a context of rank 0's. The FluxError of its beginning is raised on all."""
        with ExitStack() as stack:
            self.rank_zero_only(lambda: stack.enter_context(context) and None)
            yield

    def broadcast_result(self, work: Callable[[], Value]) -> Value:
        """Do the work on rank 0 alone; its result on every rank, as JSON carries it."""
        return self.gather(self.rank_zero_only(work))[0]

    def broadcast_bytes(self, work: Callable[[], bytes]) -> bytes:
        """Do the work on rank 0 alone; its bytes on every rank."""
        data = self.rank_zero_only(work)
        content = mx.array(np.frombuffer(data or b"", np.uint8))
        return bytes(np.array(self._exchange(None, content, PATIENCE)[0][1]))

    def agree(self, facts: Mapping[str, str], patience: float = PATIENCE) -> None:
        """FluxError on every rank, with what differs, unless the facts are the same everywhere."""
        theirs = self.gather((platform.node(), dict(facts)), patience)
        _, expected = theirs[0]
        for rank, (host, found) in enumerate(theirs):
            other = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
            if other:
                words = "; ".join(f"{name}: {found.get(name)}, not {expected.get(name)}" for name in other)
                raise RanksError(f"rank {rank} ({host}) differs from rank 0 in its {words}")

    def silence_other_ranks(self) -> None:
        """On all ranks but rank 0: discard standard output and ignore warnings."""
        if not self.is_rank_zero:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (to the process's end)
            warnings.simplefilter("ignore")

    def local_items(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that `map` gives to this rank."""
        return items if self.model_parallel else items[self.rank :: self.size]

    def map(self, work: Callable[[Item], mx.array], items: Sequence[Item]) -> Iterator[mx.array]:
        """work of each item, in order, on every rank: by one rank each, or by all if `model_parallel`.

        What work gives must then be evaluated. FluxError from work on one rank is raised on all.
        """
        if self.model_parallel or self.size == 1:
            for item in items:
                with self.waiting():
                    result = work(item)
                self.barrier()  # a sum without one of the ranks is not an error to MLX
                yield result
            return
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            made, outcome = self._try(partial(self._local_result, work, turn))
            result = mx.zeros((0,)) if made is None else made
            form = (result.shape, str(result.dtype).rpartition(".")[2])
            parts = self._exchange((outcome, form), result.flatten().view(mx.uint8), PATIENCE)
            self._check([outcome for (outcome, _), _ in parts])
            for (_, (shape, dtype)), content in parts[: len(turn)]:
                yield content.view(getattr(mx, dtype)).reshape(shape)

    def _local_result(self, work: Callable[[Item], mx.array], turn: Sequence[Item]) -> mx.array:
        """What work gives of this rank's item; nothing where there are fewer items than ranks."""
        return work(turn[self.rank]) if self.rank < len(turn) else mx.zeros((0,))

    def broadcast(self, x: mx.array) -> mx.array:
        """Rank 0's array, on every rank; the others give one of the same shape and type."""
        if self.size == 1:
            return x
        return mx.distributed.all_sum(x if self.is_rank_zero else mx.zeros_like(x), group=self.group)

    @contextmanager
    def waiting(self, patience: float | None = PATIENCE) -> Iterator[None]:
        """For what waits for other ranks: FluxError when one is lost, or the process ends with such a line.

        So no rank may leave before all have done what they do in here.
        patience: seconds, after which the process ends, with a line that says so; None for ever.
        """
        if self.size == 1:
            yield
            return
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done, patience), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not re.match(r"\[(ring|jaccl|mpi|nccl|distributed)", str(error)):
                raise
            raise FluxError(f"{self._name()}: {LOST}: {error}") from None
        finally:
            done.set()

    def _watch(self, done: threading.Event, patience: float | None) -> None:
        """In a thread: the main one is inside of MLX, where no exception reaches it.

        MLX's ring raises an error where it is in the middle of a message; the next one it may wait for in
        vain, for ever (0.32.4).
        """
        end = math.inf if patience is None else time.monotonic() + patience
        while not done.wait(min(1, max(0, end - time.monotonic()))):
            if time.monotonic() >= end:
                self._give_up(f"no word from another rank in {patience:.0f} s")
            if _is_cut(self._links) and not done.wait(min(GRACE, max(0, end - time.monotonic()))):
                self._give_up(LOST)

    def _give_up(self, why: str) -> None:
        print(f"error: {self._name()}: {why}", file=sys.stderr, flush=True)
        os._exit(2)

    def _name(self) -> str:
        return f"rank {self.rank} of {self.size} ({platform.node()})"


def _meeting_timeout() -> float:
    """In seconds. A variable and no argument: programs meet before rank 0 reads the arguments for all."""
    text = os.environ.get("FLUX_MEETING_TIMEOUT", str(MEETING))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise FluxError(f"FLUX_MEETING_TIMEOUT is {text!r}; it should be a number of seconds above 0")
    return seconds


@cache
def _meet(seconds: float) -> tuple[mx.distributed.Group, list[int]]:
    """The group, and this process's connections to other ranks: of the ring, which keeps them to the end."""
    before = set(_sockets())
    try:
        with _ended_after(seconds):
            group = mx.distributed.init()
    except RuntimeError as error:
        raise FluxError(
            f"cannot meet the other ranks: {error}: check the host file and that all were started"
        ) from None
    # MLX leaves the sockets of attempts open that came before the other rank was there: they do not count.
    links = [link for link in _sockets() if link not in before and not _is_cut([link])]
    return group, links if "MLX_HOSTFILE" in os.environ else []


WATCHER = """
import os, select, signal, sys
if not select.select([0], [], [], {seconds})[0]:  # which ends when its process has met, or has ended
    print({line!r}, file=sys.stderr, flush=True)
    os.kill({parent}, signal.SIGINT)
"""


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends the process, with one line and status 2, where the block takes longer and this is a rank.

    MLX keeps Python's lock while it waits for other ranks (0.32.4): no thread runs, nor a signal's handler
    in Python. So another process watches, and sends SIGINT, whose handler is C's own _exit; its status is the
    signal's number.
    """
    if "MLX_RANK" not in os.environ:
        yield
        return
    rank = f"rank {os.environ['MLX_RANK']} ({platform.node()})"
    line = f"error: {rank}: the other ranks have not come in {seconds:g} s: check that all were started"
    source = WATCHER.format(parent=os.getpid(), seconds=seconds, line=line)
    libc = ctypes.CDLL(None)
    before = signal.getsignal(signal.SIGINT)
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", source], stdin=subprocess.PIPE) as watcher:
        try:
            libc.signal(signal.SIGINT, ctypes.cast(libc._exit, ctypes.c_void_p))
            yield
        finally:
            watcher.communicate()
            signal.signal(signal.SIGINT, before)


def _sockets() -> list[int]:
    """The process's open sockets."""
    found = []
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the one that has listed the folder is closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
    return found


def _is_cut(links: list[int]) -> bool:
    """Whether the other end of a socket is closed: its process has ended, however it did."""
    asked = getattr(select, "POLLRDHUP", 0)  # macOS says so by POLLHUP, which need not be asked for
    poll = select.poll()
    for link in links:
        poll.register(link, asked)
    return any(event & (asked | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def print_error(error: FluxError, ranks: Ranks | None) -> None:
    """Prints an error: one that all ranks have on rank 0 alone, and before any of them goes on.

    Because mlx.launch ends all ranks when one fails. ranks: None where they have not met.
    """
    everywhere = ranks if isinstance(error, RanksError) else None
    if everywhere is None or everywhere.is_rank_zero:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if everywhere is not None:
        with suppress(FluxError):
            everywhere.barrier()
