"""Adapter files onto a whole model: the transformer, CLIP and T5 each get their part of every file."""

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from flux.adapters.adapter import Adapter
from flux.adapters.beside import linear_shape
from flux.adapters.folders import adapter_file
from flux.adapters.formats import SHOWN, TORCH, load, some
from flux.adapters.lora import WIDE, Adapters, mismatches
from flux.errors import FluxError
from flux.weights import tensors
from flux.weights.checkpoints import find_adapter


class Weighted(NamedTuple):
    """An adapter, the file that it came from, and how strongly it counts."""

    file: str
    adapter: Adapter
    strength: float


def read_weighted(files: Iterable[tuple[str | Path, float]]) -> list[Weighted]:
    """Reads adapter files, also the Hub's (`owner/name:file`), with their strengths; 1 is as it was trained.

    FluxError for a file that cannot be read or is not an adapter, for one that comes twice, and for a
    strength that is not a number.
    """
    out: list[Weighted] = []
    for file, strength in files:
        if any(other.file == str(file) for other in out):
            raise FluxError(f"already given: {file}; give it once, with the sum of the strengths")
        if not math.isfinite(strength):
            raise FluxError(f"{file}: the adapter's strength must be a finite number, not {strength}")
        out.append(Weighted(str(file), load(find_adapter(str(file))), strength))
    return out


def fingerprint(file: str | Path) -> str:
    """A short text that differs where adapters do; file: as `read_weighted` takes it."""
    path = adapter_file(find_adapter(str(file)))
    if path.suffix.lower() in TORCH:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return tensors.fingerprint(path)


def attach(networks: Mapping[str, nn.Module], adapters: Sequence[Weighted]) -> dict[str, Adapters]:
    """Puts adapters beside the weights of a model's networks: "flux", "clip" and "t5".

    Returns the adapters of each network that has some. A control adapter makes the transformer take more
    channels (its `params` say so). Warns, in one line a file, of unexpected keys and of layers that do not
    fit; both are left out. FluxError where nothing of a file fits, and for a control adapter of a model that
    takes other channels than its.
    """
    out: dict[str, Adapters] = {}
    flow = networks["flux"]
    for file, adapter, strength in sorted(adapters, key=lambda each: not is_control(each.adapter, flow)):
        for part in fitting_parts(networks, file, adapter, widen=True):
            adapters_of_part = out.setdefault(part, Adapters(networks[part]))
            adapters_of_part.add(adapter.part(part), strength, file, widen=True)
    flow.params = replace(flow.params, in_channels=linear_shape(flow.img_in)[1])
    return out


def fitting_parts(
    networks: Mapping[str, nn.Module], file: str, adapter: Adapter, widen: bool = False
) -> list[str]:
    """The networks of a model that an adapter fits, with the warnings and errors of `attach`. Lazy.

    widen: the transformer may be made to take more channels.
    """
    _check_control(file, adapter, networks["flux"], widen)
    wrong: dict[str, str] = {}
    fitting = []
    for part in adapter.parts():
        layers = adapter.part(part)
        misfits = mismatches(networks[part], layers, widen)
        wrong |= misfits
        if layers.modules.keys() - misfits.keys():
            fitting.append(part)
    lost = [f"{key}: unexpected key" for key in adapter.unexpected]
    lost += [f"{name}: {why}" for name, why in wrong.items()]
    if not fitting:
        raise FluxError(f"{file}: nothing of this adapter fits the model: {some(lost)}")
    if lost:
        _warn_of(file, lost)
    return fitting


def is_control(adapter: Adapter, flow: nn.Module) -> bool:
    """Whether an adapter is of a model that takes more channels than it gives: it needs a picture."""
    return _columns(adapter) > flow.params.out_channels


def _columns(adapter: Adapter) -> int:
    """How many channels an adapter takes; 0 where it says nothing of them."""
    delta = adapter.modules.get(WIDE)
    return 0 if delta is None else delta.shape[1] or 0


def _check_control(file: str, adapter: Adapter, flow: nn.Module, widen: bool) -> None:
    columns, taken = _columns(adapter), linear_shape(flow.img_in)[1]
    if not is_control(adapter, flow) or columns == taken:
        return
    if not widen:
        raise FluxError(f"{file}: a control adapter: it needs a control picture, which it has not here")
    if taken > flow.params.out_channels:
        raise FluxError(
            f"{file}: a control adapter, for {columns} channels; the model takes {taken}: it goes with dev"
        )


def _warn_of(file: str, lost: list[str]) -> None:
    more = f"; `python -m flux.adapters check {file} --model MODEL` names all" if len(lost) > SHOWN else ""
    warnings.warn(f"{file}: left out of the adapter: {some(lost)}{more}", stacklevel=4)


def evaluate(network: nn.Module) -> None:
    """Computes a network's weights one layer at a time, after adapters were fused into them.

    What fusing needs on the way is twice as large as a layer or more. MLX evaluates a whole graph in an
    order in which that stands in memory for many layers at once.
    """
    for layer in network.modules():
        if not layer.children():
            mx.eval(layer.parameters())
