"""Gradient checkpointing by block: what is inside a block is computed again for its gradient, not kept.

A block's inputs are all that is kept of it: of FLUX.1-dev's 57 blocks one at a time is whole in memory.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flux.models.layers import Attend, DoubleStreamBlock, SingleStreamBlock, attention
from flux.models.transformer import Flux
from flux.trees import named_arrays

MODULATION = ("img_mod", "txt_mod", "modulation")  # these are called from outside of the block


SCORES = 256 * 2**20  # bytes of attention scores that are made together


def attention_by_heads(q: mx.array, k: mx.array, v: mx.array, pe: mx.array) -> mx.array:
    """The attention of the transformer's layers, some heads at a time, each part checkpointed.

    MLX has no fused attention with a gradient but on CUDA: elsewhere the scores, L x L for each head, are in
    memory three times over, 3 GB for FLUX.1-dev at 1024x1024 in 16 bits.
    """
    pe = mx.stop_gradient(pe)  # a constant, but as an input of a checkpointed call it would be given one
    heads, length = q.shape[1:3]
    together = max(1, SCORES // (q.shape[0] * length * length * q.dtype.size))
    if together >= heads:
        return attention(q, k, v, pe)
    ends = list(range(together, heads, together))
    parts = zip(*(mx.split(x, ends, axis=1) for x in (q, k, v)), strict=True)
    run = _checkpointed(_attend, 2, 1)
    return mx.concatenate([run(k, v, q, pe)[0] for q, k, v in parts], axis=-1)  # (B, L, H*D)


def _attend(k: mx.array, v: mx.array, q: mx.array, pe: mx.array) -> list[mx.array]:
    """For `_checkpointed`: k's and v's gradients before q's, else all heads' scores wait for them."""
    return [attention(q, k, v, pe)]


class _Checkpointed(nn.Module):
    """Comes before a block's class: its call, checkpointed."""

    attend = staticmethod(attention_by_heads)
    streams = 1  # how many of a call's inputs come from the block before
    modulation_is_trained = False

    def __call__(self, *inputs: mx.array, attend: Attend | None = None) -> mx.array | tuple[mx.array, ...]:
        plain: Callable = partial(super().__call__, attend=attend)  # type: ignore[misc]  # of the block's class

        trained = dict(named_arrays(_parameters(self)))
        names = list(trained)

        def call(*arrays: mx.array) -> list[mx.array]:
            before = _parameters(self)
            self.update(tree_unflatten(list(zip(names, arrays, strict=False))))
            try:
                out = plain(*arrays[len(names) :])
            finally:
                self.update(before)
            return list(out) if isinstance(out, tuple) else [out]

        wanted = len(inputs) if self.modulation_is_trained else self.streams
        out = _checkpointed(call, len(names), wanted)(*trained.values(), *inputs)
        return tuple(out) if len(out) > 1 else out[0]


def _checkpointed(function: Callable, count: int, wanted: int) -> Callable:
    """mx.checkpoint for a function of arrays whose first `count` are parameters, with one more rule: the
    gradients of the `wanted` arrays after them go on to what made these after those of the parameters.

    Else MLX may leave the parameters' for last, and keep in memory what all of them are made of. For arrays
    that need no gradient the rule must not hold: they would get one. That of a modulation's gate alone costs
    the block's last products again.
    """
    run = mx.custom_function(function)
    end = count + wanted

    @run.vjp
    def gradients(inputs: tuple[mx.array, ...], cotangents: list[mx.array], _: list[mx.array]):
        inputs = mx.depends(list(inputs), list(cotangents))  # not before the gradient has come here
        found = mx.vjp(function, list(inputs), list(cotangents))[1]
        ready = mx.depends(found[count:end], found[:count]) if count else found[:end]
        return (*found[:count], *ready, *found[end:])

    return run


class CheckpointedDoubleStreamBlock(_Checkpointed, DoubleStreamBlock):  # type: ignore[misc]  # other `__call__`
    """A double block whose activations are computed again for the gradient."""

    streams = 2


class CheckpointedSingleStreamBlock(_Checkpointed, SingleStreamBlock):  # type: ignore[misc]  # as above
    """A single block whose activations are computed again for the gradient."""


_CLASSES: dict[type, type] = {
    DoubleStreamBlock: CheckpointedDoubleStreamBlock,
    SingleStreamBlock: CheckpointedSingleStreamBlock,
}


def checkpoint_blocks(flow: Flux, modulation_is_trained: bool = False) -> None:
    """Makes the blocks of this transformer checkpointed ones, in place; gradients stay the same to the bit.

    Call it when what is trained has been settled. modulation_is_trained: something outside of the transformer
    is trained that modulation is made of, which is CLIP; gradients are right without saying so, but then take
    more memory.

    Parameters and their names stay too, and so does what is computed without a gradient: pictures may be
    sampled in between. `plain_blocks` undoes it.
    """
    blocks = (*flow.double_blocks, *flow.single_blocks)
    inside = sum(len(named_arrays(_parameters(block))) for block in blocks)
    modulation_is_trained = modulation_is_trained or len(named_arrays(flow.trainable_parameters())) > inside
    for block in blocks:
        block.__class__ = _CLASSES.get(type(block), type(block))
        block.modulation_is_trained = modulation_is_trained


def plain_blocks(flow: Flux) -> None:
    """The inverse of `checkpoint_blocks`."""
    plain = {checkpointed: block for block, checkpointed in _CLASSES.items()}
    for block in (*flow.double_blocks, *flow.single_blocks):
        block.__class__ = plain.get(type(block), type(block))
        block.__dict__.pop("modulation_is_trained", None)


def _parameters(block: nn.Module) -> dict:
    return {name: tree for name, tree in block.trainable_parameters().items() if name not in MODULATION}
