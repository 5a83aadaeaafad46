"""Gradient checkpointing by block: what is inside a block is computed again for its gradient, not kept.

A block's inputs are all that is kept of it: of FLUX.1-dev's 57 blocks one at a time is whole in memory.
"""

import mlx.core as mx
import mlx.nn as nn

from flux.models.layers import DoubleStreamBlock, SingleStreamBlock, attention
from flux.models.transformer import Flux

MODULATION = ("img_mod", "txt_mod", "modulation")  # these are called from outside of the block


SCORES = 256 * 2**20  # bytes of attention scores that are made together


def attention_by_heads(q: mx.array, k: mx.array, v: mx.array, pe: mx.array) -> mx.array:
    """The attention of the transformer's layers, some heads at a time, each part checkpointed.

    MLX has no fused attention with a gradient but on CUDA: elsewhere the scores, L x L for each head, are in
    memory three times over, 3 GB for FLUX.1-dev at 1024x1024 in 16 bits.
    """
    heads, length = q.shape[1:3]
    together = max(1, SCORES // (q.shape[0] * length * length * q.dtype.size))
    if together >= heads:
        return attention(q, k, v, pe)
    ends = list(range(together, heads, together))
    parts = zip(*(mx.split(x, ends, axis=1) for x in (q, k, v)), strict=True)
    return mx.concatenate([mx.checkpoint(attention)(*part, pe) for part in parts], axis=-1)  # (B, L, H*D)


class _Checkpointed:
    """Comes before a block's own class: its call, checkpointed."""

    attend = staticmethod(attention_by_heads)

    def __call__(self, *inputs: mx.array) -> mx.array | tuple[mx.array, ...]:
        plain = super().__call__

        def call(parameters: dict, *inputs: mx.array) -> mx.array | tuple[mx.array, ...]:
            own = _parameters(self)
            self.update(parameters)
            try:
                return plain(*inputs)
            finally:
                self.update(own)

        # Gradients go to arguments alone, so the parameters must be some.
        return mx.checkpoint(call)(_parameters(self), *inputs)


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
