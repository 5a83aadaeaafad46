"""Gradient checkpointing by block: what is inside a block is computed again for its gradient, not kept.

A block's inputs are all that is kept of it: of FLUX.1-dev's 57 blocks one at a time is whole in memory.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from flux.models.layers import DoubleStreamBlock, SingleStreamBlock, attention
from flux.models.transformer import Flux

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
    run = _checkpointed(_attend, 2)
    return mx.concatenate([run(k, v, q, pe)[0] for q, k, v in parts], axis=-1)  # (B, L, H*D)


def _attend(k: mx.array, v: mx.array, q: mx.array, pe: mx.array) -> list[mx.array]:
    """For `_checkpointed`: the gradients of k and v before that of q, else all heads' scores wait for them."""
    return [attention(q, k, v, pe)]


class _Checkpointed:
    """Comes before a block's own class: its call, checkpointed."""

    attend = staticmethod(attention_by_heads)

    def __call__(self, *inputs: mx.array) -> mx.array | tuple[mx.array, ...]:
        plain = super().__call__

        trained = dict(tree_flatten(_parameters(self)))
        names = list(trained)

        def call(*arrays: mx.array) -> list[mx.array]:
            own = _parameters(self)
            self.update(tree_unflatten(list(zip(names, arrays, strict=False))))
            try:
                out = plain(*arrays[len(names) :])
            finally:
                self.update(own)
            return list(out) if isinstance(out, tuple) else [out]

        out = _checkpointed(call, len(names))(*trained.values(), *inputs)
        return tuple(out) if len(out) > 1 else out[0]


def _checkpointed(function: Callable, count: int) -> Callable:
    """mx.checkpoint for a function of arrays whose first `count` are parameters, with one more rule: the
    gradient goes on to the function before this one when those of the parameters are done.

    Else MLX may leave these for last, and keep in memory what all of them are made of.
    """
    run = mx.custom_function(function)

    @run.vjp
    def gradients(inputs: tuple[mx.array, ...], cotangents: list[mx.array], _: list[mx.array]):
        inputs = mx.depends(list(inputs), list(cotangents))  # not before the gradient has come here
        own = mx.vjp(function, inputs, list(cotangents))[1]
        return (*own[:count], *(mx.depends(own[count:], own[:count]) if count else own))

    return run


class CheckpointedDoubleStreamBlock(_Checkpointed, DoubleStreamBlock):
    pass


class CheckpointedSingleStreamBlock(_Checkpointed, SingleStreamBlock):
    pass


_CLASSES = {
    DoubleStreamBlock: CheckpointedDoubleStreamBlock,
    SingleStreamBlock: CheckpointedSingleStreamBlock,
}


def checkpoint_blocks(flow: Flux) -> None:
    """Makes the blocks of this transformer checkpointed ones, in place; gradients stay the same to the bit.

    Parameters and their names stay too, and so does what is computed without a gradient: pictures may be
    sampled in between. `plain_blocks` undoes it.
    """
    for block in (*flow.double_blocks, *flow.single_blocks):
        block.__class__ = _CLASSES.get(type(block), type(block))


def plain_blocks(flow: Flux) -> None:
    """The inverse of `checkpoint_blocks`."""
    plain = {checkpointed: own for own, checkpointed in _CLASSES.items()}
    for block in (*flow.double_blocks, *flow.single_blocks):
        block.__class__ = plain.get(type(block), type(block))


def _parameters(block: nn.Module) -> dict:
    return {name: tree for name, tree in block.trainable_parameters().items() if name not in MODULATION}
