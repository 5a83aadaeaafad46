"""Several machines or GPUs, started by mlx.launch: the group, how a model is split over it, averaging.

The only file that knows how a model is split. A rank is a process; rank 0 is the one that prints and writes.
"""

import json
import math
import os
import platform
import re
import select
import stat
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache, partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from flux import __version__
from flux.adapters.adapter import Dense
from flux.adapters.lora import AdaptedLinear, DenseChange, LoKr, LoRA, Share, linear_shape
from flux.errors import FluxError
from flux.models.layers import DoubleStreamBlock, SingleStreamBlock, clip_float16
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux

Value = TypeVar("Value")
Item = TypeVar("Item")

# A rank that dies is noticed at once, because its connections close. These bounds, in seconds, are for a
# machine that vanishes without a word: how long the others wait for it while it should work, or download.
PATIENCE = 3600
DOWNLOAD = 24 * 3600
GRACE = 10  # seconds for MLX to say by itself that a connection is closed
LOST = "another rank has ended or cannot be reached"
HEAD = 40  # bytes that a message begins with
SHORT = 512  # bytes that go in a first message, of a length that all know
_NUMBERS = count()  # of this process's messages


# --- The group ---


class RanksError(FluxError):
    """A FluxError that every rank raises alike: to be printed once."""


class Ranks:
    """The group that this process is in; alone, a group of one.

    split: whether the ranks have parts of the networks (`shard`) and work on everything together; otherwise
    each has them whole, and they take turns.
    """

    def __init__(self):
        """FluxError where the other ranks cannot be reached, and where one has another version."""
        self.split = False
        self.group, self._links = _meet()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.agree({"version of flux-mlx": __version__, "version of mlx": mx.__version__})

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any, patience: float = PATIENCE) -> list[Any]:
        """Every rank's value, by rank, on every rank. A value is what JSON can say."""
        return [value for value, _ in self._exchange(value, mx.zeros((0,), mx.uint8), patience)]

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
        own = mx.array(np.frombuffer(head + body, np.uint8))
        with self.waiting(patience):
            rows = self._all_gather(own[:SHORT], SHORT)
            lengths = [self._length(row, number, rank) for rank, row in enumerate(rows)]
            if max(lengths) > SHORT:
                rows = self._all_gather(own, max(lengths))
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

    def together(self, work: Callable[[], Value], patience: float = PATIENCE) -> Value:
        """What work gives, here. Where it raises FluxError on any rank, every rank raises the first.

        SystemExit, by which a parser ends after --help, likewise.
        """
        value, outcome = self._try(work)
        self._check(self.gather(outcome, patience))
        return value

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

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What work gives on rank 0, the only one to do it; as JSON says it on the others."""
        return self.gather(self.together(lambda: work() if self.first else None))[0]

    def agree(self, facts: Mapping[str, str]) -> None:
        """FluxError on every rank, with what differs, unless the facts are the same everywhere."""
        theirs = self.gather((platform.node(), dict(facts)))
        _, expected = theirs[0]
        for rank, (host, own) in enumerate(theirs):
            other = [name for name in {**expected, **own} if own.get(name) != expected.get(name)]
            if other:
                words = "; ".join(f"{name}: {own.get(name)}, not {expected.get(name)}" for name in other)
                raise RanksError(f"rank {rank} ({host}) differs from rank 0 in its {words}")

    def hush(self) -> None:
        """On all ranks but the first: standard output leads nowhere, and nothing is warned of."""
        if not self.first:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (to the process's end)
            warnings.simplefilter("ignore")

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that `map` gives to this rank."""
        return items if self.split else items[self.rank :: self.size]

    def map(self, work: Callable[[Item], mx.array], items: Sequence[Item]) -> Iterator[mx.array]:
        """work of each item, in order, on every rank: each item by one rank, or by all if they are `split`.

        What work gives must then be evaluated. FluxError from work on one rank is raised on all.
        """
        if self.split or self.size == 1:
            for item in items:
                with self.waiting():
                    result = work(item)
                self.gather(None)  # a sum without one of the ranks is no error to MLX
                yield result
            return
        for start in range(0, len(items), self.size):
            turn = items[start : start + self.size]
            own = turn[self.rank : self.rank + 1]
            result, outcome = self._try(lambda own=own: work(*own) if own else mx.zeros((0,)))
            result = mx.zeros((0,)) if result is None else result
            form = (result.shape, str(result.dtype).rpartition(".")[2])
            parts = self._exchange((outcome, form), result.flatten().view(mx.uint8), PATIENCE)
            self._check([outcome for (outcome, _), _ in parts])
            for (_, (shape, dtype)), content in parts[: len(turn)]:
                yield content.view(getattr(mx, dtype)).reshape(shape)

    def of_first(self, x: mx.array) -> mx.array:
        """Rank 0's array, on every rank; the others give one of the same shape and type."""
        if self.size == 1:
            return x
        return mx.distributed.all_sum(x if self.first else mx.zeros_like(x), group=self.group)

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
            if _is_cut(self._links) and not done.wait(GRACE):
                self._give_up(LOST)

    def _give_up(self, why: str) -> None:
        print(f"error: {self._name()}: {why}", file=sys.stderr, flush=True)
        os._exit(2)

    def _name(self) -> str:
        return f"rank {self.rank} of {self.size} ({platform.node()})"


@cache
def _meet() -> tuple[mx.distributed.Group, list[int]]:
    """The group, and this process's connections to other ranks: of the ring, which keeps them to the end."""
    before = set(_sockets())
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise FluxError(
            f"cannot meet the other ranks: {error}: check the host file and that all were started"
        ) from None
    # MLX leaves the sockets of attempts open that came before the other rank was there: they are none.
    links = [link for link in _sockets() if link not in before and not _is_cut([link])]
    return group, links if "MLX_HOSTFILE" in os.environ else []


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


def tell(error: FluxError, ranks: Ranks | None) -> None:
    """Prints an error: one that all ranks have on rank 0 alone, and before any of them goes on.

    Because mlx.launch ends all ranks when one fails. ranks: None where they have not met.
    """
    everywhere = ranks is not None and isinstance(error, RanksError)
    if not everywhere or ranks.first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if everywhere:
        with suppress(FluxError):
            ranks.gather(None)


def share(total: int, rank: int, size: int) -> range:
    """A rank's part of 0, 1, ..., total - 1: neighbours, and for each rank as many as possible the same."""
    whole, extra = divmod(total, size)
    start = rank * whole + min(rank, extra)
    return range(start, start + whole + (rank < extra))


# --- The plan: how each layer is split ---

# A layer's weight is (outputs, inputs). COLUMN gives a rank some of the outputs, and ROW some of the inputs,
# so that the ranks' results add up to the layer's; between a COLUMN and a ROW no rank needs another's values
# (Shoeybi et al. 2019, Megatron-LM). GATHER is COLUMN, and then every rank is given all outputs. TABLE is
# COLUMN for an embedding.
COLUMN, ROW, GATHER, TABLE = "column", "row", "gather", "table"


class Rule(NamedTuple):
    """How the layers are split whose names match. Layers without a rule are whole on every rank.

    parts: what lies side by side along the axis that is split, each to be split by itself: all heads of q, of
    k or of v ("heads"), one value a head ("head"), the hidden layer of an MLP ("mlp"), anything ("any").
    """

    names: str
    kind: str
    parts: tuple[str, ...]


FLUX_RULES = (
    Rule(r"double_blocks\.\d+\.(img|txt)_attn\.qkv", COLUMN, ("heads", "heads", "heads")),
    Rule(r"double_blocks\.\d+\.(img|txt)_attn\.proj", ROW, ("heads",)),
    Rule(r"double_blocks\.\d+\.(img|txt)_mlp\.0", COLUMN, ("mlp",)),
    Rule(r"double_blocks\.\d+\.(img|txt)_mlp\.2", ROW, ("mlp",)),
    Rule(r"single_blocks\.\d+\.linear1", COLUMN, ("heads", "heads", "heads", "mlp")),
    Rule(r"single_blocks\.\d+\.linear2", ROW, ("heads", "mlp")),
    # Once a picture, for all its steps: messages cost little here, and the weights are a quarter of all.
    Rule(r".*(img_mod|txt_mod|modulation)\.lin|final_layer\.adaLN_modulation\.1", GATHER, ("any",)),
)
T5_RULES = (
    Rule(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkv]", COLUMN, ("heads",)),
    Rule(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias", TABLE, ("head",)),
    Rule(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.o", ROW, ("heads",)),
    Rule(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi_[01]", COLUMN, ("mlp",)),
    Rule(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo", ROW, ("mlp",)),
)

Pieces = list[tuple[int, int]]  # of an axis: (start, stop) each


class Shape(NamedTuple):
    """What of a network's shape the rules speak of."""

    heads: int
    head_dim: int
    mlp: int
    unit: int  # the MLP is split at multiples of it: quantized inputs come in groups

    def pieces(self, rule: Rule, width: int, rank: int, size: int) -> Pieces:
        """What of an axis of this width is a rank's. Heads that do not divide are split unevenly."""
        heads = share(self.heads, rank, size)
        groups = share(-(-self.mlp // self.unit), rank, size)
        mlp = (groups.start * self.unit, min(groups.stop * self.unit, self.mlp))
        anything = share(width, rank, size)
        own = {
            "heads": (heads.start * self.head_dim, heads.stop * self.head_dim),
            "head": (heads.start, heads.stop),
            "mlp": mlp,
            "any": (anything.start, anything.stop),
        }
        widths = {"heads": self.heads * self.head_dim, "head": self.heads, "mlp": self.mlp, "any": width}
        starts = accumulate((widths[part] for part in rule.parts), initial=0)
        return [
            (start + own[part][0], start + own[part][1])
            for start, part in zip(starts, rule.parts, strict=False)
        ]


def check_heads(network: Flux, ranks: Ranks) -> None:
    """FluxError where a transformer cannot be split over so many ranks: each needs a head of its own."""
    if network.params.num_heads < ranks.size:
        raise FluxError(
            f"the model's {network.params.num_heads} heads cannot be split over {ranks.size} ranks: start "
            f"{network.params.num_heads} at most, or make a picture for each rank"
        )


def shard(network: Flux | T5Encoder, ranks: Ranks) -> None:
    """Splits a network in place, lazily, after everything else that changes it; the answer stays the same.

    Each rank keeps its part of the heads and of the MLPs. Two messages a double block or a T5 block, one a
    single block; 77 small ones a picture for FLUX.1's modulation. T5 stays whole where it has fewer heads
    than there are ranks. Adapters beside the weights are split with them, and can then be changed no more.
    `flux.adapters.evaluate` then reads the weights so that no more than one whole layer is in memory at once.

    FluxError for a transformer with fewer heads than ranks, and where a quantization group is cut in two.
    """
    if ranks.size == 1:
        return
    unit = max(
        (m.group_size for _, m in network.named_modules() if isinstance(m, nn.QuantizedLinear)), default=1
    )
    params = network.params
    if isinstance(network, T5Encoder):
        if params.num_heads < ranks.size:
            return
        rules, shape = T5_RULES, Shape(params.num_heads, params.d_kv, params.d_ff, unit)
    else:
        check_heads(network, ranks)
        mlp = int(params.hidden_size * params.mlp_ratio)
        rules, shape = FLUX_RULES, Shape(params.num_heads, params.hidden_size // params.num_heads, mlp, unit)
    split = []
    for name, module in network.named_modules():
        rule = next((rule for rule in rules if re.fullmatch(rule.names, name)), None)
        if rule is not None:
            split.append((name, _split(name, module, rule, shape, ranks)))
    network.update_modules(tree_unflatten(split))
    for block in network.modules():
        if isinstance(block, DoubleStreamBlock):
            block.last_layers = partial(_last_layers, ranks.group)
        if isinstance(block, SingleStreamBlock):
            qkv, _ = linear_shape(block.linear1)
            block.qkv_share = (3 * len(share(shape.heads, ranks.rank, ranks.size)) * shape.head_dim, qkv)


def _split(name: str, layer: nn.Module, rule: Rule, shape: Shape, ranks: Ranks) -> nn.Module:
    """A rank's part of a layer, with the message that it needs."""
    if rule.kind == TABLE:
        part = copy(layer)
        part.weight = _cut(layer.weight, shape.pieces(rule, layer.weight.shape[1], ranks.rank, ranks.size), 1)
        return part
    axis = 1 if rule.kind == ROW else 0
    width = linear_shape(layer)[axis]
    try:
        part = _cut_linear(layer, shape.pieces(rule, width, ranks.rank, ranks.size), axis)
    except ValueError as error:
        raise FluxError(f"{name} cannot be split over {ranks.size} ranks: {error}") from None
    if rule.kind == ROW:
        return RowParallel(part, _bias(layer), ranks.group)
    if rule.kind == GATHER:
        return Gathered(
            part, [len(share(width, rank, ranks.size)) for rank in range(ranks.size)], ranks.group
        )
    return part


class RowParallel(nn.Module):
    """The layer whose parts the ranks have: the sum of their results, and the bias once."""

    def __init__(self, part: nn.Module, bias: mx.array | None, group: mx.distributed.Group):
        super().__init__()
        self.part = part
        if bias is not None:
            self.bias = bias
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        return self.finish(mx.distributed.all_sum(self.partial(x), group=self._group))

    def partial(self, x: mx.array) -> mx.array:
        """This rank's summand, (..., its inputs) -> (..., outputs)."""
        return clip_float16(self.part(x))  # infinities of two signs would add up to NaN

    def finish(self, total: mx.array) -> mx.array:
        return total + self.bias if "bias" in self else total


class Gathered(nn.Module):
    """The layer whose outputs the ranks have: all of them, on every rank. sizes: how many each has."""

    def __init__(self, part: nn.Module, sizes: list[int], group: mx.distributed.Group):
        super().__init__()
        self.part = part
        self._sizes, self._group = sizes, group

    def __call__(self, x: mx.array) -> mx.array:
        own = self.part(x)  # (..., own)
        missing = max(self._sizes) - own.shape[-1]
        own = mx.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, missing)])[None]
        parts = mx.distributed.all_gather(own, group=self._group)  # (ranks, ..., the most)
        return mx.concatenate([p[..., :n] for p, n in zip(parts, self._sizes, strict=True)], axis=-1)


def _last_layers(
    group: mx.distributed.Group, txt_layer: RowParallel, img_layer: RowParallel, txt: mx.array, img: mx.array
) -> tuple[mx.array, mx.array]:
    """`DoubleStreamBlock.last_layers` with one message for both streams."""
    own = mx.concatenate([txt_layer.partial(txt), img_layer.partial(img)], axis=1)  # (B, Lt+Li, C)
    total = mx.distributed.all_sum(own, group=group)
    txt, img = mx.split(total, [txt.shape[1]], axis=1)
    return txt_layer.finish(txt), img_layer.finish(img)


# --- Parts of layers ---


def _cut(x: mx.array, pieces: Pieces, axis: int) -> mx.array:
    """The pieces of an axis, in memory of their own: a view would keep all of x."""
    at = (slice(None),) * axis
    return mx.contiguous(mx.concatenate([x[(*at, slice(*piece))] for piece in pieces], axis))


def _cut_linear(layer: nn.Module, pieces: Pieces, axis: int) -> nn.Module:
    """Some outputs (axis 0) or inputs (axis 1, without bias) of a layer. ValueError where a group is cut."""
    part = copy(layer)
    if isinstance(layer, AdaptedLinear):
        part.base = _cut_linear(layer.base, pieces, axis)
        part.shares = [_cut_share(share, pieces, axis) for share in layer.shares]
        return part
    of_inputs = ("weight",)
    if isinstance(layer, nn.QuantizedLinear):
        of_inputs = ("weight", "scales", "biases")
        size = layer.group_size
        if axis == 1 and any(at % size for piece in pieces for at in piece):
            raise ValueError(f"its inputs are quantized in groups of {size}, and one would be cut in two")
    for name in of_inputs:
        value = layer.get(name)
        if value is not None:
            per_value = linear_shape(layer)[1] // value.shape[1]  # inputs that one column stands for
            scale = per_value if axis == 1 else 1
            part[name] = _cut(value, [(start // scale, stop // scale) for start, stop in pieces], axis)
    if "bias" in layer:
        if axis == 0:
            part.bias = _cut(layer.bias, pieces, 0)
        else:
            del part["bias"]
    return part


def _cut_share(own: Share, pieces: Pieces, axis: int) -> Share:
    """An adapter's part beside the same part of its layer. DoRA's norms are those of whole rows."""
    part = copy(own)
    if own.layer is not None:
        part.layer = _cut_change(own.layer, pieces, axis)
    if axis == 1:
        part.bias = None  # `_bias` has it
        return part
    for name in ("bias", "magnitude", "_norms"):
        value = getattr(own, name)
        if value is not None:
            setattr(part, name, _cut(value, pieces, 0))
    return part


def _cut_change(layer: LoRA | LoKr | DenseChange, pieces: Pieces, axis: int) -> LoRA | DenseChange:
    if isinstance(layer, LoKr):  # a part of a Kronecker product is none
        return DenseChange(Dense(_cut(layer.change().dense().astype(layer.w1.dtype), pieces, axis)))
    part = copy(layer)
    name = "weight" if isinstance(layer, DenseChange) else ("up", "down")[axis]
    part[name] = _cut(layer[name], pieces, axis)
    return part


def _bias(layer: nn.Module) -> mx.array | None:
    """All that a layer adds whatever its input, its adapters' biases included."""
    if not isinstance(layer, AdaptedLinear):
        return layer.get("bias")
    own = [share.strength * share.bias for share in layer.shares if share.bias is not None]
    base = _bias(layer.base)
    if base is not None:
        own = [base, *(bias.astype(base.dtype) for bias in own)]
    return sum(own[1:], start=own[0]) if own else None


# --- Training ---


def average_gradients(group: mx.distributed.Group) -> Callable[[dict], dict]:
    """Mean of the gradients of all processes, in one message: many small ones would cost latency."""

    def average(gradients: dict) -> dict:
        flat = [array for _, array in tree_flatten(gradients)]
        message = mx.concatenate([array.reshape(-1) for array in flat]) / group.size()
        message = mx.distributed.all_sum(message, group=group)
        ends = list(accumulate(array.size for array in flat))
        parts = iter(mx.split(message, ends[:-1]))
        return tree_map(lambda array: next(parts).reshape(array.shape).astype(array.dtype), gradients)

    return average


ALIGNED = 16  # bytes: every array in a message begins at a multiple of it


def scatter(network: Flux, ranks: Ranks) -> None:
    """Leaves each rank an equal part of the frozen linear layers of a transformer's blocks, in place.

    For weights that do not fit one machine (FSDP; Rajbhandari et al. 2020, arXiv:1910.02054, stage 3). Each
    call of a layer gathers its bytes on every rank, so all must make the same calls; the answers stay the
    same to the bit. In checkpointed blocks no more than a few layers are whole at a time.

    MLX's own `nn.fully_shard` does this for arrays of floats whose first axis the ranks divide; quantized
    layers it cannot gather, and over the ring it has no gradient for what is trained.
    FluxError for a DoRA that learns: it needs the whole weights beside the layer.
    """
    if ranks.size == 1:
        return
    shares = [module for module in network.modules() if isinstance(module, Share)]
    if any(own.learns and own.magnitude is not None for own in shares):
        raise FluxError("the base cannot be shared out over ranks beside a DoRA: leave one of them out")
    kinds = nn.Linear | nn.QuantizedLinear
    for block in (*network.double_blocks, *network.single_blocks):
        layers = {name: module for name, module in block.named_modules() if isinstance(module, kinds)}
        for name in list(layers):  # one after the other is let go of
            block.update_modules(tree_unflatten([(name, Scattered(layers.pop(name), ranks))]))


class Scattered(nn.Module):
    """A frozen layer of whose weights the ranks have a part each, as bytes; the bias is whole."""

    def __init__(self, layer: nn.Module, ranks: Ranks):
        super().__init__()
        arrays = {name: layer[name] for name in ("weight", "scales", "biases") if layer.get(name) is not None}
        rows = [_aligned(array.reshape(-1).view(mx.uint8), ALIGNED) for array in arrays.values()]
        message = _aligned(mx.concatenate(rows), ALIGNED * ranks.size)
        length = message.size // ranks.size
        self.part = mx.contiguous(message[ranks.rank * length : (ranks.rank + 1) * length])
        mx.eval(self.part)  # now: the whole layer is let go of before the next one is read
        if "bias" in layer:
            self.bias = layer.bias
        template = copy(layer)  # without the weights
        for name in arrays:
            del template[name]
        starts = list(accumulate((row.size for row in rows), initial=0))
        places = [(n, a.shape, a.dtype, start) for (n, a), start in zip(arrays.items(), starts, strict=False)]
        self._layer = lambda whole: _with_arrays(template, whole, places)
        self._group = ranks.group
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        # Not before x is there: or else MLX might gather all layers at once.
        part = mx.depends([self.part], [mx.stop_gradient(x)])[0]
        whole = mx.distributed.all_gather(part, group=self._group)
        return self._layer(mx.stop_gradient(whole))(x)


def _aligned(x: mx.array, step: int) -> mx.array:
    """Bytes (n,), with zeros up to a multiple of step."""
    return mx.pad(x, (0, -x.size % step))


def _with_arrays(
    template: nn.Module, whole: mx.array, places: list[tuple[str, tuple[int, ...], mx.Dtype, int]]
) -> nn.Module:
    """The layer with its arrays cut out of a message (n,) of bytes; places: name, shape, type and start."""
    layer = copy(template)
    for name, shape, dtype, start in places:
        size = dtype.size * math.prod(shape)
        layer[name] = whole[start : start + size].view(dtype).reshape(shape)
    return layer
