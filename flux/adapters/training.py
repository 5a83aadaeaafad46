"""A new adapter to be trained: which layers it changes, and its first values."""

import math
import re

import mlx.core as mx
import mlx.nn as nn

from flux.adapters.adapter import Adapter
from flux.adapters.beside import dense_weight, linear_shape
from flux.adapters.changes import Delta, LowRank, row_norms
from flux.adapters.lora import linears
from flux.adapters.selection import select
from flux.errors import FluxError

DEFAULT_TARGET = "attention-mlp"


def targets(model: nn.Module, which: str = DEFAULT_TARGET, last_blocks: int | None = None) -> list[str]:
    """The names of the layers to train.

    which: as `selection.select` takes it. last_blocks: only so many blocks from the network's end (single
    blocks come after double blocks). FluxError where that is no layer.
    """
    layers = list(linears(model))
    names = select(layers, which)
    if last_blocks is None:
        return names
    if last_blocks < 1:
        raise FluxError(f"the last {last_blocks} blocks: give 1 or more")
    blocks = sorted({block for name in layers if (block := _block(name))})
    names = [name for name in names if _block(name) in blocks[-last_blocks:]]
    if not names:
        raise FluxError(f"targets {which!r}: the last {last_blocks} blocks have no such layer")
    return names


def _block(name: str) -> tuple[bool, int] | None:
    """A key that sorts blocks from the input to the output; None outside of the blocks."""
    match = re.match(
        r"(double_blocks|single_blocks|text_model\.encoder\.layers|encoder\.block)\.(\d+)\.", name
    )
    return (match[1] == "single_blocks", int(match[2])) if match else None


def new_adapter(
    model: nn.Module, names: list[str], rank: int, alpha: float, key: mx.array, dora: bool = False
) -> Adapter:
    """An adapter that changes nothing yet: up is zero, down uniform in +-1/sqrt(in), as in PEFT and kohya.

    That is Kaiming's uniform law with a = sqrt(5) (torch.nn.Linear's). All in float32: updates are smaller
    than what 16 bits can tell apart. dora: with magnitudes, the weights' row norms. Add it to the network by
    `Adapters.add(adapter, name=..., dropout=..., trainable=True)`, then `Adapters.freeze_all_but(name)`.
    """
    if rank < 1:
        raise FluxError(f"rank {rank}: give 1 or more")
    layers = linears(model)
    modules: dict[str, Delta] = {}
    for name, own_key in zip(names, mx.random.split(key, len(names)), strict=True):
        rows, columns = linear_shape(layers[name])
        bound = 1 / math.sqrt(columns)
        down = mx.random.uniform(-bound, bound, (rank, columns), key=own_key)
        change = LowRank(down, mx.zeros((rows, rank)), alpha)
        modules[name] = Delta(change, magnitude=row_norms(dense_weight(layers[name])) if dora else None)
    return Adapter(modules)
