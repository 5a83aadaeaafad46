"""Adapters of a network: add, weigh, train, fuse, remove.

Every changed Linear (quantized or not) is wrapped; each adapter has a layer in the wrapper, so that
several change the same layer at once. The network knows nothing of it.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flux.adapters.adapter import Adapter
from flux.adapters.beside import AdaptedLinear, AdapterLayer, Base, linear_shape
from flux.adapters.changes import Delta
from flux.errors import FluxError
from flux.weights.quantize import PARTS

WIDE = "img_in"  # the layer that takes more channels in a model that is given a picture


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and QuantizedLinear by the checkpoint's name, wrapped ones as their wrappers."""
    kinds = AdaptedLinear | nn.Linear | nn.QuantizedLinear
    modules = dict(reversed(model.named_modules()))  # MLX lists them from the output to the input
    return {n: m for n, m in modules.items() if isinstance(m, kinds) and not n.endswith(".base")}


def mismatches(model: nn.Module, adapter: Adapter, widen: bool = False) -> dict[str, str]:
    """What of an adapter does not fit a network: name -> why. widen: see `Adapters.add`."""
    layers = linears(model)
    out: dict[str, str] = {}
    for name, delta in adapter.modules.items():
        if name not in layers:
            out[name] = "the model has no such layer"
        elif fault := _misfit(name, delta, layers[name], widen):
            out[name] = fault
    for name, value in {**adapter.replaced, **adapter.added}.items():
        current = _parameter(model, name)
        if current is None or current.shape != value.shape:
            shape = "no such parameter" if current is None else f"shape {tuple(current.shape)}"
            out[name] = f"the adapter has shape {tuple(value.shape)}, the model has {shape}"
    return out


def _misfit(name: str, delta: Delta, layer: nn.Module, widen: bool) -> str | None:
    """Why a change does not fit a layer. Of `img_in` one of them may have more columns than the other."""
    rows, columns = linear_shape(layer)
    its_rows, its_columns = delta.shape
    more = (its_columns or columns) - columns
    if more > 0:
        fits = widen and name == WIDE and not isinstance(layer, AdaptedLinear) and more % columns == 0
    else:
        fits = more == 0 or (name == WIDE and delta.widened(columns) is not None)
    if fits and its_rows in (None, rows):
        return None
    hint = "; a control adapter, which takes a structure picture" if name == WIDE and more > 0 else ""
    return f"the adapter is for {its_columns} -> {its_rows}, the layer is {columns} -> {rows}{hint}"


class Adapters:
    """The adapters of one network, by name. A network has at most one such object at a time.

    A function compiled before a change of these keeps the old state: compile it anew.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.strengths: dict[str, float] = {}
        self._norms: dict[str, Adapter] = {}  # name -> the adapter, of those that change norms
        self._originals: dict[str, mx.array] = {}  # parameters changed in place, as they were
        self._narrow: dict[str, mx.array] = {}  # img_in's parameters before it was widened

    def add(
        self,
        adapter: Adapter,
        strength: float = 1.0,
        name: str | None = None,
        *,
        strict: bool = False,
        widen: bool = False,
        dropout: float = 0.0,
        trainable: bool = False,
    ) -> dict[str, str]:
        """Puts an adapter beside the weights: W x + sum of strength (W' - W) x over all adapters.

        Returns what of it does not fit the network and was left out, name -> why; strict: FluxError instead.
        FluxError too where nothing fits. widen: an adapter whose `img_in` takes more channels than the
        network's makes it wider with zeros, before others change that layer; only a caller that feeds those
        channels may ask for it. One that takes fewer leaves the others as they are.
        trainable, dropout: for training, see `flux.adapters.training`.
        """
        name = name or f"adapter {len(self.strengths) + 1}"
        if name in self.strengths:
            raise FluxError(f"the model already has an adapter named {name!r}")
        wrong = mismatches(self.model, adapter, widen)
        fitting = [module for module in adapter.modules if module not in wrong]
        if wrong and (strict or not fitting):
            lines = "; ".join(f"{module}: {why}" for module, why in list(wrong.items())[:8])
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise FluxError(
                f"{name}: {len(wrong)} of {len(adapter.modules)} layers do not fit: {lines}{more}"
            )
        layers = linears(self.model)
        for module in fitting:
            layer = layers[module]
            if not isinstance(layer, AdaptedLinear):
                layer = AdaptedLinear(layer)
                _set_module(self.model, module, layer)
            delta = adapter.modules[module]
            if (delta.shape[1] or 0) > linear_shape(layer.base)[1]:
                self._widen(layer.base, delta.shape[1] or 0)
            delta = delta.widened(linear_shape(layer.base)[1]) or delta
            share = AdapterLayer(name, delta.settled(layer.base.get("bias")), strength, dropout, trainable)
            share.weigh(strength, Base(layer.base))
            layer.shares.append(share)
        self.strengths[name] = strength
        replaced, added = (
            {path: value for path, value in norms.items() if path not in wrong}
            for norms in (adapter.replaced, adapter.added)
        )
        if replaced or added:
            self._norms[name] = Adapter({}, replaced, added)
            self._apply_norms()
        return wrong

    def set_strength(self, name: str, strength: float) -> None:
        """Weighs an adapter anew; 0 gives the base model."""
        for layer, share in self._layers_of(name):
            share.weigh(strength, Base(layer.base))
        self.strengths[name] = strength
        self._apply_norms()

    def remove(self, name: str) -> None:
        """Takes an adapter away; without adapters the network is as it was."""
        for layer, _ in list(self._layers_of(name)):
            layer.shares = [share for share in layer.shares if share.name != name]
        del self.strengths[name]
        self._norms.pop(name, None)
        self._apply_norms()
        self._unwrap([path for path, layer in self._wrapped() if not layer.shares])
        if self._narrow and not isinstance(self.model.img_in, AdaptedLinear):
            self.model.img_in.update(self._narrow)
            self._narrow = {}

    def fuse(self) -> list[str]:
        """Bakes all adapters into the weights that are not quantized, in float32, and lets go of them.

        Returns the layers whose adapters stay beside them because their weights are quantized: rounding to a
        few bits would swallow the change. To fuse them all, fuse before quantizing. Lazy, so that quantizing
        may follow before a layer takes memory; see `flux.adapters.evaluate` for the time after that.
        """
        kept, done = [], []
        for path, layer in self._wrapped():
            if isinstance(layer.base, nn.QuantizedLinear):
                kept.append(path)
                continue
            weight, dtype = layer.base.weight, layer.base.weight.dtype
            change = sum(share.weight_change(weight) for share in layer.shares)
            layer.base.weight = (weight.astype(mx.float32) + change).astype(dtype)
            biases = [share.strength * share.bias for share in layer.shares if share.bias is not None]
            if biases:
                bias = layer.base.bias if "bias" in layer.base else mx.zeros((weight.shape[0],))
                layer.base.bias = sum(biases, start=bias.astype(mx.float32)).astype(dtype)
            done.append(path)
        self._unwrap(done)
        left = {share.name for _, layer in self._wrapped() for share in layer.shares}
        self.strengths = {name: s for name, s in self.strengths.items() if name in left}
        self._norms, self._originals, self._narrow = {}, {}, {}
        return kept

    def extract(self, name: str) -> Adapter:
        """The adapter's weights as they are now, for saving: those of an adapter that is trained."""
        norms = self._norms.get(name, Adapter({}))
        deltas = {p: s.delta() for p, layer in self._wrapped() for s in layer.shares if s.name == name}
        return Adapter(deltas, norms.replaced, norms.added)

    def freeze_all_but(self, name: str) -> None:
        """Leaves the weights of one adapter as the network's only trainable parameters."""
        self.model.freeze()
        for _, share in self._layers_of(name):
            share.unfreeze()

    def _wrapped(self) -> list[tuple[str, AdaptedLinear]]:
        return [(path, m) for path, m in linears(self.model).items() if isinstance(m, AdaptedLinear)]

    def _layers_of(self, name: str) -> Iterator[tuple[AdaptedLinear, AdapterLayer]]:
        if name not in self.strengths:
            known = ", ".join(self.strengths) or "none"
            raise FluxError(f"the model has no adapter named {name!r}: it has {known}")
        for _, layer in self._wrapped():
            yield from ((layer, share) for share in layer.shares if share.name == name)

    def _unwrap(self, paths: list[str]) -> None:
        layers = linears(self.model)
        for path in paths:
            _set_module(self.model, path, layers[path].base)

    def _widen(self, base: nn.Module, columns: int) -> None:
        """New columns of zeros: the network's answer does not change until the adapter fills them."""
        factor = columns // linear_shape(base)[1]  # packed weights and their scales grow alike
        self._narrow = {name: base[name] for name in PARTS if base.get(name) is not None}
        for name, array in self._narrow.items():
            base[name] = mx.pad(array, [(0, 0), (0, (factor - 1) * array.shape[1])])

    def _apply_norms(self) -> None:
        """Norms have no wrapper: their parameters are set anew from the originals."""
        for path in {p for a in self._norms.values() for p in (*a.replaced, *a.added)}:
            value = _parameter(self.model, path)
            if value is not None:
                self._originals.setdefault(path, value)
        for path, original in self._originals.items():
            value = original.astype(mx.float32)
            for name, adapter in self._norms.items():
                if path in adapter.replaced:
                    value = value + self.strengths[name] * (adapter.replaced[path] - original)
                if path in adapter.added:
                    value = value + self.strengths[name] * adapter.added[path]
            _set_parameter(self.model, path, value.astype(original.dtype))


# --- Paths such as `double_blocks.0.img_mlp.2` ---


def _child(parent: Any, key: str) -> Any:
    if isinstance(parent, list):
        return parent[int(key)] if key.isdigit() and int(key) < len(parent) else None
    return getattr(parent, key, None)


def _parent(model: nn.Module, path: str) -> tuple[Any, str]:
    *parents, last = path.split(".")
    parent: Any = model
    for key in parents:
        parent = _child(parent, key)
    return parent, last


def _parameter(model: nn.Module, path: str) -> mx.array | None:
    value = _child(*_parent(model, path))
    return value if isinstance(value, mx.array) else None


def _set_parameter(model: nn.Module, path: str, value: mx.array) -> None:
    parent, last = _parent(model, path)
    setattr(parent, last, value)


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, last = _parent(model, path)
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        setattr(parent, last, module)
