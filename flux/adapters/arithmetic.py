"""Adapters calculated with: added up, cut down to a smaller rank, taken from two checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from flux.adapters.adapter import Adapter
from flux.adapters.beside import dense_weight, linear_shape
from flux.adapters.changes import Additive, Change, Delta, Dense, LowRank, Stack, folded
from flux.adapters.formats import some
from flux.adapters.lora import linears
from flux.errors import FluxError

EXACT = 512  # up to so many rows or columns all singular values are computed
OVERSAMPLING, PASSES = 16, 6  # of the iteration that finds the largest ones of a wider matrix


def merge(adapters: Sequence[tuple[str, Adapter, float]], rank: int | None = None) -> Adapter:
    """The sum of adapters, (name, adapter, strength) each, as one of strength 1.

    Exact: low ranks add up. rank: each layer's sum cut down to it. FluxError for a change that depends on the
    base weights, such as a DoRA: there is no sum of those.
    """
    layers: dict[str, list[tuple[Delta, float]]] = {}
    added: dict[str, mx.array] = {}
    for name, adapter, strength in adapters:
        _refuse(name, adapter)
        for module, delta in adapter.modules.items():
            layers.setdefault(module, []).append((delta, strength))
        for path, value in adapter.added.items():
            added[path] = added.get(path, 0) + strength * value
    merged = Adapter({module: _sum(module, group) for module, group in layers.items()}, added=added)
    return merged if rank is None else resize(merged, rank)[0]


def _refuse(name: str, adapter: Adapter) -> None:
    wrong = [module for module, delta in adapter.modules.items() if not _adds(delta)] + list(adapter.replaced)
    if wrong:
        raise FluxError(
            f"{name}: what it changes depends on the base weights, so that it has no sum: {some(wrong)}"
        )


def _adds(delta: Delta) -> bool:
    """Whether a change is the same matrix and bias for every base."""
    is_plain = delta.magnitude is None and delta.bias_factor is None and delta.new_bias is None
    if isinstance(delta.change, Stack):
        return is_plain and delta.change.is_additive
    return is_plain and isinstance(delta.change, Additive | None)


def _sum(module: str, deltas: Sequence[tuple[Delta, float]]) -> Delta:
    changes = [(delta.change, strength) for delta, strength in deltas if delta.change is not None]
    biases = [
        strength * delta.bias.astype(mx.float32) for delta, strength in deltas if delta.bias is not None
    ]
    shapes = {change.shape for change, _ in changes} | {(bias.shape[0], None) for bias in biases}
    if len({rows for rows, _ in shapes}) > 1 or len({c for _, c in shapes if c is not None}) > 1:
        raise FluxError(f"{module}: the adapters are for layers of different sizes")
    return Delta(_sum_changes(changes) if changes else None, sum(biases[1:], biases[0]) if biases else None)


def _sum_changes(changes: Sequence[tuple[Change, float]]) -> Change:
    ranks = [(change, strength) for change, strength in changes if isinstance(change, LowRank)]
    if len(ranks) < len(changes):
        first, *others = (strength * _dense(change) for change, strength in changes)
        return Dense(sum(others, first))
    weighed = [folded(replace(change, alpha=strength * change.alpha)) for change, strength in ranks]
    down, up = mx.concatenate([c.down for c in weighed]), mx.concatenate([c.up for c in weighed], axis=1)
    return LowRank(down, up, down.shape[0])  # (sum of r, in), (out, sum of r)


def _dense(change: Change) -> mx.array:
    """dW (out, in) of a change that `_adds`."""
    assert isinstance(change, Additive | Stack)
    return change.dense()


# --- Ranks ---


def resize(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, tuple[float, float]]]:
    """Every layer's change by the LoRA of this rank that is nearest to it (Eckart and Young, 1936).

    Also what was kept: layer -> (energy kept, energy in all), in squared singular values. Scales of a DoRA
    and biases stay. FluxError for a change that depends on the base weights.
    """
    wrong = [name for name, delta in adapter.modules.items() if not _adds(replace(delta, magnitude=None))]
    if wrong:
        raise FluxError(
            f"what this adapter changes depends on the base weights, so that it has no rank: {some(wrong)}"
        )
    modules: dict[str, Delta] = {}
    energies: dict[str, tuple[float, float]] = {}
    for name, delta in tqdm(adapter.modules.items(), unit="layer", leave=False):
        if delta.change is not None:
            change, kept, total = nearest(delta.change, rank)
            delta, energies[name] = replace(delta, change=change), (kept, total)
        modules[name] = delta
    return replace(adapter, modules=modules), energies


def nearest(change: Change, rank: int) -> tuple[LowRank, float, float]:
    """The change of this rank or less that is nearest, and the energy that it keeps, of how much."""
    if isinstance(change, LowRank):
        left, right = _qr(change.up), _qr(change.down.T)
        core = change.scale * (left[1] @ right[1].T)
        u, s, vt = mx.linalg.svd(core, stream=mx.cpu)
        u, vt, dtype = left[0] @ u, vt @ right[0].T, change.down.dtype
    else:
        u, s, vt = _svd(_dense(change), rank)
        dtype = mx.float32
    return _low_rank(u, s, vt, rank, dtype)


def _low_rank(
    u: mx.array, s: mx.array, vt: mx.array, rank: int, dtype: mx.Dtype, total: float | None = None
) -> tuple[LowRank, float, float]:
    rank = min(rank, s.size)
    root = mx.sqrt(s[:rank])
    down, up = (root[:, None] * vt[:rank]).astype(dtype), (u[:, :rank] * root).astype(dtype)
    mx.eval(down, up)  # now: the matrices behind them are large
    return LowRank(down, up, rank), _energy(s[:rank]), _energy(s) if total is None else total


def _energy(values: mx.array) -> float:
    """The sum of squares."""
    return float(np.array(mx.sum(values**2)))


def _qr(matrix: mx.array) -> tuple[mx.array, mx.array]:
    return mx.linalg.qr(matrix.astype(mx.float32), stream=mx.cpu)


def _svd(matrix: mx.array, rank: int) -> tuple[mx.array, mx.array, mx.array]:
    """U, s, V^T of a matrix (out, in): all of it, or of a large one the largest part (Halko et al. 2011)."""
    size = rank + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT, 2 * size):
        return mx.linalg.svd(matrix, stream=mx.cpu)
    basis = mx.random.normal((matrix.shape[1], size), key=mx.random.key(0))
    for _ in range(PASSES):
        basis = _qr(matrix @ basis)[0]  # (out, size)
        basis = _qr(matrix.T @ basis)[0]  # (in, size)
        mx.eval(basis)
    left, core = _qr(matrix @ basis)
    u, s, vt = mx.linalg.svd(core, stream=mx.cpu)
    return left @ u, s, vt @ basis.T


# --- From two checkpoints ---


def extract(base: nn.Module, tuned: nn.Module, rank: int) -> tuple[Adapter, dict[str, tuple[float, float]]]:
    """The LoRA of this rank nearest to the difference of two networks, and the energies as of `resize`.

    Both are emptied: each layer is read, compared and let go of. Biases and norms that differ are kept whole.
    FluxError where the networks differ in their layers, or not at all.
    """
    weights, others = _taken_apart(base), _taken_apart(tuned)
    modules: dict[str, Delta] = {}
    energies: dict[str, tuple[float, float]] = {}
    _compare(weights, others)
    for name in tqdm(list(weights[0]), unit="layer", leave=False):
        first, second = weights[0].pop(name), others[0].pop(name)
        difference = dense_weight(second) - dense_weight(first)
        total = _energy(difference)
        change = None
        if total > 0:
            change, kept, _ = _low_rank(*_svd(difference, rank), rank, mx.float32, total)
            energies[name] = kept, total
        bias = _difference(first.get("bias"), second.get("bias"))
        first.clear()  # whoever holds the network: a layer at a time is in memory
        second.clear()
        if change is not None or bias is not None:
            modules[name] = Delta(change, bias)
    norms = {name: _difference(weights[1][name], value) for name, value in others[1].items()}
    if not modules:
        raise FluxError("the two checkpoints have the same weights: there is nothing to extract")
    return Adapter(modules, added={name: d for name, d in norms.items() if d is not None}), energies


def _taken_apart(network: nn.Module) -> tuple[dict[str, nn.Module], dict[str, mx.array]]:
    """A network's linear layers and its other parameters, by name."""
    layers = linears(network)
    parameters: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    others = {name: value for name, value in parameters.items() if name.rpartition(".")[0] not in layers}
    return layers, others


def _compare(first: tuple[dict, dict], second: tuple[dict, dict]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        if odd := ours.keys() ^ theirs.keys():
            raise FluxError(f"the two checkpoints differ in what they have: {some(sorted(odd))}")
    wrong = [n for n, layer in first[0].items() if linear_shape(layer) != linear_shape(second[0][n])]
    if wrong:
        raise FluxError(f"the two checkpoints differ in the sizes of their layers: {some(wrong)}")


def _difference(first: mx.array | None, second: mx.array | None) -> mx.array | None:
    """What the second has more, or None where they are equal."""
    if first is None or second is None or mx.array_equal(first, second).item():
        return None
    out = second.astype(mx.float32) - first.astype(mx.float32)
    mx.eval(out)
    return out


def share_kept(energies: dict[str, tuple[float, float]]) -> float:
    """The part of the energy of all layers that was kept, from 0 to 1."""
    total = math.fsum(total for _, total in energies.values())
    return math.fsum(kept for kept, _ in energies.values()) / total if total else 1.0
