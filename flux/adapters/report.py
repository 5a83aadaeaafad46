"""What an adapter holds, in words."""

from collections import Counter

from flux.adapters import changes
from flux.adapters.adapter import Adapter
from flux.adapters.names import template

KINDS: dict[type, str] = {
    changes.LowRank: "LoRA",
    changes.Kronecker: "LoKr",
    changes.Hadamard: "LoHa",
    changes.GLoRA: "GLoRA",
    changes.Scaling: "(IA)3",
    changes.Rotation: "OFT",
    changes.Dense: "full matrix",
    changes.Replacement: "whole layer",
}


def table(adapter: Adapter) -> list[str]:
    """One line for each kind of layer: its name, how many, what changes it."""
    kinds = Counter((template(module), _kind(delta)) for module, delta in adapter.modules.items())
    kinds.update((template(path), "norm") for path in (*adapter.replaced, *adapter.added))
    width = max(len(name) for name, _ in kinds)
    return [f"{name:{width}}  {count:3} x {what}" for (name, what), count in kinds.items()]


def _kind(delta: changes.Delta) -> str:
    """What changes a layer, in words."""
    change = delta.change
    if change is None:
        return "bias alone"
    if isinstance(change, changes.Stack):
        return "parts: " + ", ".join(dict.fromkeys(_kind(part) for *_, part in change.parts))
    what = KINDS[type(change)]
    if isinstance(change, changes.LowRank):
        what = f"{'LoRA' if delta.magnitude is None else 'DoRA'} rank {change.rank} alpha {change.alpha:g}"
    elif delta.magnitude is not None:
        what += " with DoRA"
    if delta.magnitude is not None and delta.magnitude.ndim == 2:
        what += " along the columns"
    return what if delta.bias is None and delta.new_bias is None else what + " with bias"
