"""How networks are split over several machines or GPUs: each rank has a part of the heads and of the MLPs."""

import re
from copy import copy
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flux.adapters.beside import AdaptedLinear, AdapterLayer, DenseChange, LoRA, linear_shape
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.models.layers import DoubleStreamBlock, SingleStreamBlock, clip_float16
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux


def shard_range(total: int, rank: int, size: int) -> range:
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
        heads = shard_range(self.heads, rank, size)
        groups = shard_range(-(-self.mlp // self.unit), rank, size)
        mlp = (groups.start * self.unit, min(groups.stop * self.unit, self.mlp))
        anything = shard_range(width, rank, size)
        local = {
            "heads": (heads.start * self.head_dim, heads.stop * self.head_dim),
            "head": (heads.start, heads.stop),
            "mlp": mlp,
            "any": (anything.start, anything.stop),
        }
        widths = {"heads": self.heads * self.head_dim, "head": self.heads, "mlp": self.mlp, "any": width}
        starts = accumulate((widths[part] for part in rule.parts), initial=0)
        return [
            (start + local[part][0], start + local[part][1])
            for start, part in zip(starts, rule.parts, strict=False)
        ]


def check_heads(network: Flux, ranks: Ranks) -> None:
    """FluxError where a transformer cannot be split over so many ranks: each needs a head."""
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
    rules: tuple[Rule, ...]
    if isinstance(network, T5Encoder):
        t5 = network.params
        if t5.num_heads < ranks.size:
            return
        rules, shape = T5_RULES, Shape(t5.num_heads, t5.d_kv, t5.d_ff, unit)
    else:
        check_heads(network, ranks)
        flow = network.params
        mlp = int(flow.hidden_size * flow.mlp_ratio)
        network.over_heads = partial(mx.distributed.all_sum, group=ranks.group)  # type: ignore[method-assign]
        rules, shape = FLUX_RULES, Shape(flow.num_heads, flow.hidden_size // flow.num_heads, mlp, unit)
    split = []
    for name, module in network.named_modules():
        rule = next((rule for rule in rules if re.fullmatch(rule.names, name)), None)
        if rule is not None:
            split.append((name, _split(name, module, rule, shape, ranks)))
    network.update_modules(tree_unflatten(split))
    for block in network.modules():
        if isinstance(block, DoubleStreamBlock):
            block.last_layers = partial(_last_layers, ranks.group)  # type: ignore[method-assign]  # its seam
        if isinstance(block, SingleStreamBlock):
            qkv, _ = linear_shape(block.linear1)
            block.qkv_share = (
                3 * len(shard_range(shape.heads, ranks.rank, ranks.size)) * shape.head_dim,
                qkv,
            )


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
            part, [len(shard_range(width, rank, ranks.size)) for rank in range(ranks.size)], ranks.group
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
        """The sum of all ranks' summands, (..., outputs), with the bias."""
        return total + self.bias if "bias" in self else total


class Gathered(nn.Module):
    """The layer whose outputs the ranks have: all of them, on every rank. sizes: how many each has."""

    def __init__(self, part: nn.Module, sizes: list[int], group: mx.distributed.Group):
        super().__init__()
        self.part = part
        self._sizes, self._group = sizes, group

    def __call__(self, x: mx.array) -> mx.array:
        y = self.part(x)  # (..., this rank's)
        missing = max(self._sizes) - y.shape[-1]
        y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, missing)])[None]
        parts = mx.distributed.all_gather(y, group=self._group)  # (ranks, ..., the most)
        return mx.concatenate([p[..., :n] for p, n in zip(parts, self._sizes, strict=True)], axis=-1)


def _last_layers(
    group: mx.distributed.Group, txt_layer: RowParallel, img_layer: RowParallel, txt: mx.array, img: mx.array
) -> tuple[mx.array, mx.array]:
    """`DoubleStreamBlock.last_layers` with one message for both streams."""
    partial_sums = mx.concatenate([txt_layer.partial(txt), img_layer.partial(img)], axis=1)  # (B, Lt+Li, C)
    total = mx.distributed.all_sum(partial_sums, group=group)
    txt, img = mx.split(total, [txt.shape[1]], axis=1)
    return txt_layer.finish(txt), img_layer.finish(img)


# --- Parts of layers ---


def _cut(x: mx.array, pieces: Pieces, axis: int) -> mx.array:
    """A copy of the pieces of an axis: a view would keep all of x in memory."""
    at = (slice(None),) * axis
    return mx.contiguous(mx.concatenate([x[(*at, slice(*piece))] for piece in pieces], axis))


def _cut_linear(layer: nn.Module, pieces: Pieces, axis: int) -> nn.Module:
    """Some outputs (axis 0) or inputs (axis 1, without bias) of a layer. ValueError where a group is cut."""
    part = copy(layer)
    if isinstance(layer, AdaptedLinear):
        part.base = _cut_linear(layer.base, pieces, axis)
        part.shares = [_cut_adapter(share, layer.base, pieces, axis) for share in layer.shares]
        return part
    of_inputs: tuple[str, ...] = ("weight",)
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


def _cut_adapter(adapter: AdapterLayer, base: nn.Module, pieces: Pieces, axis: int) -> AdapterLayer:
    """An adapter's part beside the same part of its layer. DoRA's norms are those of whole rows.

    Of a change of another kind than low rank or dense a part cannot be of that kind: it becomes dense.
    """
    of_rows = adapter.magnitude is None or adapter.magnitude.ndim == 1
    if not (isinstance(adapter.layer, LoRA | DenseChange | None) and of_rows):
        adapter = adapter.flattened(base)
    part = copy(adapter)
    if adapter.layer is not None:
        part.layer = copy(adapter.layer)
        name = "weight" if isinstance(adapter.layer, DenseChange) else ("up", "down")[axis]
        part.layer[name] = _cut(adapter.layer[name], pieces, axis)
    if axis == 1:
        part.bias = None  # `_bias` has it
        return part
    for name in ("bias", "magnitude", "_norms"):
        value = getattr(adapter, name)
        if value is not None:
            setattr(part, name, _cut(value, pieces, 0))
    return part


def _bias(layer: nn.Module) -> mx.array | None:
    """All that a layer adds whatever its input, its adapters' biases included."""
    if not isinstance(layer, AdaptedLinear):
        return layer.get("bias")
    biases = [share.strength * share.bias for share in layer.shares if share.bias is not None]
    base = _bias(layer.base)
    if base is not None:
        biases = [base, *(bias.astype(base.dtype) for bias in biases)]
    return sum(biases[1:], start=biases[0]) if biases else None
