"""An Adapter -> files of split layers under diffusers' names: diffusers' and ai-toolkit's."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from flux.adapters.adapter import Adapter, part_of
from flux.adapters.changes import Delta, LowRank, Stack, folded
from flux.adapters.formats import MLP_RATIO, some
from flux.adapters.fused import split, swap_halves
from flux.adapters.peft_config import DIFFUSERS_PARTS, PEFT_METADATA
from flux.errors import FluxError
from flux.weights.keymaps import TRANSFORMER, find_theirs

Tensors = dict[str, mx.array]
Metadata = Callable[[Mapping[str, str]], dict[str, str]]  # from our entries, the format's


class Part(NamedTuple):
    """A layer's LoRA, with alpha equal to the rank, and what else PEFT knows of it."""

    lora: LowRank
    bias: mx.array | None
    magnitude: mx.array | None


NOT_LOW_RANK = "changes that are not of low rank, or DoRA along the columns"


def refuse(format: str, what: str, modules: list[str]) -> None:
    """FluxError where some modules have what a format cannot hold."""
    if modules:
        raise FluxError(f"{format} files cannot hold {what}: {some(modules)}")


def to_diffusers(adapter: Adapter) -> tuple[Tensors, Metadata]:
    """Alpha is folded into the matrices: a reader that ignores the header then gets the same strength."""
    _refuse_for_peft("diffusers", adapter)
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for part in ("flux", "clip"):
        prefix = DIFFUSERS_PARTS[part]
        parts = _peft_parts("diffusers", adapter.part(part))
        if parts:
            tensors |= _peft_tensors(prefix, parts)
            config |= {f"{prefix}.{name}": value for name, value in _peft_config(parts).items()}
    for name, value in adapter.replaced.items():
        found = find_theirs(TRANSFORMER, name.removesuffix(".scale"))
        if found is None:
            raise FluxError(f"diffusers files cannot hold norms of the text encoders: {name}")
        tensors[f"transformer.{found[1][0]}.weight"] = value
    packed = json.dumps(config, indent=2, sort_keys=True)
    return tensors, lambda facts: {"format": "pt", PEFT_METADATA: packed}


def to_ai_toolkit(adapter: Adapter) -> tuple[Tensors, Metadata]:
    """As diffusers', without a config, which ai-toolkit does not read: of the transformer, LoRAs alone."""
    _refuse_for_peft("ai-toolkit", adapter)
    refuse("ai-toolkit", "text encoders", [name for name in adapter.modules if part_of(name) != "flux"])
    refuse("ai-toolkit", "norms", list(adapter.replaced))
    odd = [n for n, d in adapter.modules.items() if d.bias is not None or d.magnitude is not None]
    refuse("ai-toolkit", "biases and DoRA", odd)
    tensors = _peft_tensors(DIFFUSERS_PARTS["flux"], _peft_parts("ai-toolkit", adapter))
    return tensors, lambda facts: {"format": "pt", "ss_base_model_version": "flux1"}


def _refuse_for_peft(format: str, adapter: Adapter) -> None:
    other = [n for n, d in adapter.modules.items() if not isinstance(d.change, LowRank | Stack)]
    refuse(format, NOT_LOW_RANK, other)
    refuse(format, "T5 layers", [name for name in adapter.modules if part_of(name) == "t5"])
    refuse(format, "added norms", list(adapter.added))
    biases = [n for n, d in adapter.modules.items() if d.bias_factor is not None or d.new_bias is not None]
    refuse(format, "scaled biases and layers that were trained whole", biases)


def _peft_parts(format: str, adapter: Adapter) -> dict[str, Part]:
    """Changes under diffusers' names, with alpha equal to the rank. FluxError for what is not of low rank."""
    out: dict[str, Part] = {}
    wrong: list[str] = []
    for module, delta in adapter.modules.items():
        for name, part in split_names(module, delta):
            if isinstance(part.change, LowRank) and not part.is_of_columns:
                out[name] = Part(folded(part.change), part.bias, part.magnitude)
            elif part.shape != (None, None):
                wrong.append(module)
    refuse(format, NOT_LOW_RANK, list(dict.fromkeys(wrong)))
    return out


def split_names(module: str, delta: Delta) -> list[tuple[str, Delta]]:
    """A module's change under diffusers' names, of a fused layer that of each part."""
    found = find_theirs(TRANSFORMER, module)
    if found is None:
        return [(module, delta)]
    row, theirs = found
    if row.swapped:
        delta = swap_halves(delta)
    rows, columns = delta.shape
    # q, k and v have as many rows as columns; what else linear1 has is the MLP.
    hidden = columns or (rows or 0) // (3 + MLP_RATIO if len(theirs) == 4 else len(theirs))
    cuts = [hidden * i for i in range(1, len(theirs))]
    return list(zip(theirs, split(delta, cuts) if cuts else [delta], strict=True))


def _peft_tensors(prefix: str, parts: Mapping[str, Part]) -> Tensors:
    out: Tensors = {}
    biased = any(part.bias is not None for part in parts.values())
    whole = [
        name
        for name, part in parts.items()
        if part.magnitude is None or mx.any(mx.isnan(part.magnitude)).item()
    ]
    if len(whole) < len(parts):
        refuse("diffusers", "layers without DoRA beside layers with it", whole)
    for name, part in parts.items():
        stem = f"{prefix}.{name}"
        out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = part.lora.down, part.lora.up
        if biased:  # PEFT knows biases for all layers or for none
            zeros = mx.zeros((part.lora.shape[0],), dtype=part.lora.up.dtype)
            out[f"{stem}.lora_B.bias"] = zeros if part.bias is None else part.bias
        if part.magnitude is not None:
            out[f"{stem}.lora_magnitude_vector"] = part.magnitude
    return out


def _peft_config(parts: Mapping[str, Part]) -> dict[str, Any]:
    """PEFT's LoraConfig for these layers, with alpha equal to the rank everywhere.

    PEFT matches names from their end. CLIP's layers go without `text_model.`, which newer versions of
    transformers do not have; the transformer's `proj_out` is told from the blocks' by its start.
    """
    names = {name: name.removeprefix("text_model.") for name in parts}
    ranks = {names[name]: part.lora.rank for name, part in parts.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    start = "" if names.keys() != set(names.values()) else "^"
    odd = {start + name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "lora_bias": any(part.bias is not None for part in parts.values()),
    }
