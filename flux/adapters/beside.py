"""Adapters beside a weight that stays as it is, quantized or not: what each kind of change adds to W x.

A layer here is called with (x, plain, base, strength): x (..., in), plain = W x (..., out), base the product
with W itself. It gives (W' - W) x (..., out) at that strength.
"""

from copy import copy
from dataclasses import dataclass
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn

from flux.adapters.changes import (
    Change,
    Delta,
    Dense,
    GLoRA,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    Rotation,
    Scaling,
    Stack,
)

Kind = TypeVar("Kind", bound=Change)


class Base:
    """The product with some rows of a Linear's or QuantizedLinear's weight, without the bias."""

    def __init__(self, layer: nn.Module, start: int = 0, end: int | None = None):
        self.layer, self.start, self.end = layer, start, end

    def __call__(self, x: mx.array) -> mx.array:
        if not isinstance(self.layer, nn.Linear | nn.QuantizedLinear):  # its weights may be elsewhere
            out = self.layer(x)
            return (out - self.layer.bias if "bias" in self.layer else out)[..., self.start : self.end]
        part = copy(self.layer)
        for name in ("weight", "scales", "biases"):
            if part.get(name) is not None:
                part[name] = part[name][self.start : self.end]
        part.pop("bias", None)
        return part(x)

    def weight(self) -> mx.array:
        """These rows (n, in) in float32."""
        return dense_weight(self.layer)[self.start : self.end]

    def rows(self, start: int, end: int) -> "Base":
        """Some of these rows."""
        return Base(self.layer, self.start + start, self.start + end)


class LoRA(nn.Module):
    """(alpha / r) up (down x)."""

    def __init__(self, change: LowRank):
        super().__init__()
        self.down, self.up, self.alpha = change.down, change.up, change.alpha

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        # The weights go to x's type, not x to theirs: 16-bit activations stay small beside float32 weights.
        down, up = self.down.astype(x.dtype), self.up.astype(x.dtype)
        scale = strength * self.alpha / down.shape[0]
        return (scale * (x @ down.T)) @ up.T  # the factor where it is small: (..., r)

    def change(self) -> LowRank:
        """The change as data, with the weights as they are now; so the other kinds."""
        return LowRank(self.down, self.up, self.alpha)


class LoKr(nn.Module):
    """scale kron(w1, w2) x, without making the product."""

    def __init__(self, change: Kronecker):
        super().__init__()
        self.w1, self.w2, self.scale = change.w1, change.w2, change.scale

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        w1, w2 = self.w1.astype(x.dtype), self.w2.astype(x.dtype)
        x = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])  # (..., b*d) -> (..., b, d)
        return strength * self.scale * (w1 @ (x @ w2.T)).flatten(-2)  # (..., a, c) -> (..., a*c)

    def change(self) -> Kronecker:
        """The change as data."""
        return Kronecker(self.w1, self.w2, self.scale)


class DenseChange(nn.Module):
    """dW x."""

    def __init__(self, change: Dense):
        super().__init__()
        self.weight = change.weight

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        return strength * (x @ self.weight.astype(x.dtype).T)

    def change(self) -> Dense:
        """The change as data."""
        return Dense(self.weight)


class ChangeLayer(nn.Module, Generic[Kind]):
    """A change that is not trained here: its arrays are kept as they are."""

    def __init__(self, change: Kind):
        super().__init__()
        self._change = change

    def change(self) -> Kind:
        """The change as data."""
        return self._change


class LoHa(ChangeLayer[Hadamard]):
    """dW x, where dW is made at every call: it is as large as W, its factors are small."""

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        return strength * (x @ self._change.dense().astype(x.dtype).T)


class GLoRALayer(ChangeLayer[GLoRA]):
    """scale (W a1 a2 x + b1 b2 x)."""

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        change = self._change
        a1, a2, b1, b2 = (w.astype(x.dtype) for w in (change.a1, change.a2, change.b1, change.b2))
        scale = strength * change.scale
        return base((scale * (x @ a2.T)) @ a1.T) + (scale * (x @ b2.T)) @ b1.T


class ScalingLayer(ChangeLayer[Scaling]):
    """factor W x, or W (factor x)."""

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        factor = (strength * self._change.factor).astype(x.dtype)
        return plain * factor[:, 0] if factor.shape[1] == 1 else base(x * factor[0])


class RotationLayer(ChangeLayer[Rotation]):
    """rescale B (W x), or W (B x), less W x."""

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        change = self._change
        turned = base(change.turn(x, strength)) if change.inner else change.turn(plain, strength)
        return change.scaled(strength).reshape(-1).astype(x.dtype) * turned - plain


class ReplacementLayer(ChangeLayer[Replacement]):
    """weight x - W x."""

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        return strength * (x @ self._change.weight.astype(x.dtype).T - plain)


class StackLayer(ChangeLayer[Stack]):
    """The changes of a fused layer's parts, one under another; zeros where no part is."""

    def __init__(self, change: Stack):
        super().__init__(change)
        self._parts = [(start, end, AdapterLayer("", delta, 1.0)) for start, end, delta in change.parts]

    def prepare(self, base: Base, strength: float) -> None:
        """Weighs the parts."""
        for start, end, part in self._parts:
            part.weigh(strength, base.rows(start, end))

    def __call__(self, x: mx.array, plain: mx.array, base: Base, strength: float) -> mx.array:
        pieces, at = [], 0
        for start, end, part in self._parts:
            pieces += [mx.zeros_like(plain[..., at:start])] * (start > at)
            pieces.append(part(x, plain[..., start:end], base.rows(start, end)))
            at = end
        pieces += [mx.zeros_like(plain[..., at:])] * (plain.shape[-1] > at)
        return mx.concatenate(pieces, axis=-1)


LAYERS: dict[type, type] = {
    LowRank: LoRA,
    Kronecker: LoKr,
    Dense: DenseChange,
    Hadamard: LoHa,
    GLoRA: GLoRALayer,
    Scaling: ScalingLayer,
    Rotation: RotationLayer,
    Replacement: ReplacementLayer,
    Stack: StackLayer,
}


@dataclass
class _Draw:
    """A random key that a module's state does not hold: a function that is compiled need not give it back."""

    key: mx.array


class Dropout(nn.Module):
    """In training, sets each element of x to zero with this probability and scales the others up.

    Which ones comes from a key that `draw_dropout` gives, not from MLX's global state: a step that is
    resumed, or computed again for its gradient, drops the same.
    """

    def __init__(self, probability: float):
        super().__init__()
        self._probability = probability
        self._draw = _Draw(mx.random.key(0))

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self._probability == 0:
            return x
        kept = mx.random.bernoulli(1 - self._probability, x.shape, key=self._draw.key)
        return mx.where(kept, x / (1 - self._probability), 0)


def draw_dropout(model: nn.Module, key: mx.array) -> None:
    """Gives every Dropout of a model another key, made of this one: before each step of a training."""
    layers = [module for module in model.modules() if isinstance(module, Dropout) and module._probability]
    for layer, part in zip(layers, mx.random.split(key, max(1, len(layers))), strict=False):
        layer._draw.key = part


class AdapterLayer(nn.Module):
    """What one adapter adds to one layer: (W' - W) x at its strength.

    dropout works on this layer's input alone, while it is trained. trainable: the weights are being trained,
    and a DoRA's norms follow them, as constants of the gradient (section 4.3 of the paper).
    """

    def __init__(
        self, name: str, delta: Delta, strength: float, dropout: float = 0.0, trainable: bool = False
    ):
        super().__init__()
        self.name, self.strength, self.trainable = name, strength, trainable
        self.dropout = Dropout(dropout)
        self.layer = None if delta.change is None else LAYERS[type(delta.change)](delta.change)
        self.bias, self.magnitude, self.rule = delta.bias, delta.magnitude, delta.rule
        self._norms: mx.array | None = None  # of a DoRA that is not trained

    def weigh(self, strength: float, base: Base) -> None:
        """Sets the strength, and computes once what depends on it and the base layer alone."""
        self.strength = strength
        if isinstance(self.layer, StackLayer):
            self.layer.prepare(base, strength)
        if self.magnitude is not None and not self.trainable:
            self._norms = self.delta().norms(base.weight(), strength)
            mx.eval(self._norms)  # now: the dense weight behind it is large

    def __call__(self, x: mx.array, plain: mx.array, base: Base) -> mx.array:
        """x (..., in), plain (..., out): what the base layer makes of x, without its bias."""
        if self.strength == 0:
            return mx.zeros_like(plain)
        out = (
            mx.zeros_like(plain)
            if self.layer is None
            else self._changed(self.layer, self.dropout(x), plain, base)
        )
        return out if self.bias is None else out + (self.strength * self.bias).astype(x.dtype)

    def _changed(self, layer: nn.Module, x: mx.array, plain: mx.array, base: Base) -> mx.array:
        if self.magnitude is None:
            return layer(x, plain, base, self.strength)
        delta = self.delta()
        norms = self._norms  # None while they follow what is trained
        if norms is None:
            norms = mx.stop_gradient(delta.norms(base.weight(), self.strength))
        ratio = delta.ratio(norms, self.strength)  # float32, so that ratio - 1 keeps its digits
        more, ratio = (ratio - 1).astype(x.dtype), ratio.astype(x.dtype)
        inner = delta.inner_strength(self.strength)
        if not delta.is_of_columns:  # of what comes out
            return more * plain + ratio * layer(x, plain, base, inner)
        added = base(more[0] * x)  # of what goes in
        return added + layer(ratio[0] * x, plain + added, base, inner)

    def delta(self) -> Delta:
        """The layer as data, with the weights as they are now."""
        change = None if self.layer is None else self.layer.change()
        return Delta(change, self.bias, self.magnitude, rule=self.rule)

    def weight_change(self, weight: mx.array) -> mx.array:
        """W' - W at the layer's strength for W (out, in), in float32."""
        return self.delta().delta(weight, self.strength)

    def flattened(self, base: nn.Module) -> "AdapterLayer":
        """The same as a dense change at strength 1, in the type of the base layer's activations."""
        dtype = (base.scales if isinstance(base, nn.QuantizedLinear) else base.weight).dtype
        bias = None if self.bias is None else self.strength * self.bias
        change = Dense(self.weight_change(dense_weight(base)).astype(dtype))
        return AdapterLayer(self.name, Delta(change, bias), 1.0)


class AdaptedLinear(nn.Module):
    """A Linear or QuantizedLinear with any number of adapters beside it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.shares: list[AdapterLayer] = []  # the name is a part of the keys of trainings' states

    def __call__(self, x: mx.array) -> mx.array:
        out = self.base(x)
        plain = out - self.base.bias if "bias" in self.base else out
        base = Base(self.base)
        for share in self.shares:
            out = out + share(x, plain, base)
        return out


def dense_weight(layer: nn.Module) -> mx.array:
    """The weight (out, in) in float32 of a Linear or QuantizedLinear; of a wrapped one, without adapters."""
    layer = layer.base if isinstance(layer, AdaptedLinear) else layer
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight.astype(mx.float32)
    return mx.dequantize(
        layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, layer.mode, dtype=mx.float32
    )


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or QuantizedLinear, wrapped or not."""
    layer = layer.base if isinstance(layer, AdaptedLinear) else layer
    rows, columns = layer.weight.shape
    return (rows, columns * 32 // layer.bits) if isinstance(layer, nn.QuantizedLinear) else (rows, columns)
