"""Adapters: LoRA and its kin of every file format, beside or in the weights, loaded or trained."""

from flux.adapters.adapter import Adapter
from flux.adapters.attach import Weighted, attach, evaluate, fingerprint, fitting_parts, read_weighted
from flux.adapters.beside import draw_dropout
from flux.adapters.changes import Delta, Dense, Kronecker, LowRank
from flux.adapters.formats import load
from flux.adapters.lora import Adapters, mismatches
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
    "fingerprint",
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
