"""A frozen base in parts: a rank keeps a part of the weights, and a layer is gathered when it is called."""

import math
from copy import copy
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flux.adapters.beside import AdapterLayer
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.models.transformer import Flux

ALIGNED = 16  # bytes: every array in a message begins at a multiple of it


def fully_shard(network: Flux, ranks: Ranks) -> None:
    """Leave each rank an equal part of the frozen linear layers of a transformer's blocks, in place.

    For weights that do not fit one machine (FSDP; Rajbhandari et al. 2020, arXiv:1910.02054, stage 3). Each
    call of a layer gathers its bytes on every rank, so all must make the same calls; the answers stay the
    same to the bit. In checkpointed blocks no more than a few layers are whole at a time.

    MLX's `nn.fully_shard` does this for arrays of floats whose first axis the ranks divide; quantized
    layers it cannot gather, and over the ring it has no gradient for what is trained.
    FluxError for a trainable DoRA: it needs the whole weights beside the layer.
    """
    if ranks.size == 1:
        return
    adapters = [module for module in network.modules() if isinstance(module, AdapterLayer)]
    if any(layer.trainable and layer.magnitude is not None for layer in adapters):
        raise FluxError("the base cannot be sharded over ranks beside a DoRA in training: choose one")
    kinds = nn.Linear | nn.QuantizedLinear
    for block in (*network.double_blocks, *network.single_blocks):
        layers = {name: module for name, module in block.named_modules() if isinstance(module, kinds)}
        for name in list(layers):  # one after the other is let go of
            block.update_modules(tree_unflatten([(name, FullySharded(layers.pop(name), ranks))]))


class FullySharded(nn.Module):
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
        layout = [(n, a.shape, a.dtype, start) for (n, a), start in zip(arrays.items(), starts, strict=False)]
        self._layer = lambda whole: _with_arrays(template, whole, layout)
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
    template: nn.Module, whole: mx.array, layout: list[tuple[str, tuple[int, ...], mx.Dtype, int]]
) -> nn.Module:
    """The layer with its arrays cut out of a message (n,) of bytes; layout: name, shape, type and start."""
    layer = copy(template)
    for name, shape, dtype, start in layout:
        size = dtype.size * math.prod(shape)
        layer[name] = whole[start : start + size].view(dtype).reshape(shape)
    return layer
