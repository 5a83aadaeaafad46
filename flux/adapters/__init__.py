"""Adapters: LoRA, DoRA and LoKr of every file format, beside or in the weights, loaded or trained."""

from flux.adapters.adapter import Adapter, Delta, Dense, Kronecker, LowRank
from flux.adapters.attach import Weighted, attach, evaluate, fitting_parts, read_weighted
from flux.adapters.formats import load
from flux.adapters.lora import Adapters, draw_dropout, mismatches
from flux.adapters.selection import TARGETS, is_preset, partly_named
from flux.adapters.training import new_adapter, targets
from flux.adapters.writers import read_facts, save

__all__ = [
    "TARGETS",
    "Adapter",
    "Adapters",
    "Delta",
    "Dense",
    "Kronecker",
    "LowRank",
    "Weighted",
    "attach",
    "draw_dropout",
    "evaluate",
    "fitting_parts",
    "is_preset",
    "load",
    "mismatches",
    "new_adapter",
    "partly_named",
    "read_facts",
    "read_weighted",
    "save",
    "targets",
]
