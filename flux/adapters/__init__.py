"""Adapters: LoRA and its kin of every file format, beside or in the weights, loaded or trained."""

from flux.adapters.adapter import Adapter
from flux.adapters.attach import Weighted, attach, evaluate, fingerprint, fitting_parts, read_weighted
from flux.adapters.beside import draw_dropout
from flux.adapters.changes import Delta, Dense, Kronecker, LowRank
from flux.adapters.formats import load
from flux.adapters.lora import Adapters, mismatches
from flux.adapters.training import TARGETS, new_adapter, targets
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
    "load",
    "mismatches",
    "new_adapter",
    "read_facts",
    "read_weighted",
    "save",
    "targets",
]
