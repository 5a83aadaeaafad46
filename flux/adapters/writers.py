"""An Adapter -> a file that other programs load: ours, kohya's, diffusers'.

What a format has no place for is refused by name, never left out.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux.adapters.adapter import Adapter, Delta, Dense, Kronecker, LowRank, fold, folded, part_of
from flux.adapters.formats import DIFFUSERS_PARTS, PEFT_METADATA, some
from flux.adapters.fused import split, swap_halves
from flux.errors import FluxError
from flux.weights import tensors as files
from flux.weights.keymaps import TRANSFORMER, find_theirs

Tensors = dict[str, mx.array]

# What a trained adapter tells about itself, in every format under these names, and what kohya calls the same.
OWN = "flux_mlx."
FACTS = ("base_model", "trigger", "steps", "dataset_hash")
KOHYA_FACTS = {"base_model": "ss_sd_model_name", "trigger": "modelspec.trigger_phrase", "steps": "ss_steps"}
# Entries of a header that are true only of the file that they stood in.
STALE = {
    "format",
    PEFT_METADATA,
    "ss_network_dim",
    "ss_network_alpha",
    "lora_rank",
    "lora_blocks",
    "mflux_version",
}


def save(path: str | Path, adapter: Adapter, format: str, facts: Mapping[str, str] | None = None) -> None:
    """Writes the adapter whole or not at all. format: "native", "kohya" or "diffusers".

    native: BFL's names as ComfyUI writes them, every kind of change; ComfyUI reads it, and diffusers its
    low-rank parts. facts: base_model, trigger, steps, dataset_hash; they are kept in a conversion.
    FluxError where the format cannot hold a part of the adapter.
    """
    if format not in WRITERS:
        raise FluxError(f"no adapter format {format!r}: one of {', '.join(WRITERS)}")
    if unknown := set(facts or ()) - set(FACTS):
        raise FluxError(f"no fact of an adapter: {', '.join(sorted(unknown))}; one of {', '.join(FACTS)}")
    tensors, metadata = WRITERS[format](adapter)
    own = {
        OWN + name: str(value) for name, value in {**read_facts(adapter.metadata), **(facts or {})}.items()
    }
    kept = {name: value for name, value in adapter.metadata.items() if name not in STALE}
    ranks, alphas = adapter.ranks().values(), adapter.alphas().values()
    own |= {OWN + "rank": _usual(ranks), OWN + "alpha": _usual(alphas)} if ranks else {}
    files.save(Path(path), tensors, {**kept, **metadata(own), **own})


def read_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts in a header, by our names for them or by kohya's."""
    found = {name: metadata.get(OWN + name, metadata.get(KOHYA_FACTS.get(name, ""))) for name in FACTS}
    return {name: value for name, value in found.items() if value is not None}


def _usual(values: Any) -> str:
    """The most frequent number, as text."""
    return f"{Counter(values).most_common(1)[0][0]:g}"


Metadata = Callable[[Mapping[str, str]], dict[str, str]]  # from our own entries, the format's own


# --- Ours and kohya's: BFL's modules, alpha beside the matrices ---

NATIVE = {
    "flux": "diffusion_model.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
KOHYA = {"flux": "lora_unet_", "clip": "lora_te1_", "t5": "lora_te3_"}


def to_native(adapter: Adapter) -> tuple[Tensors, Metadata]:
    tensors: Tensors = {}
    for module, delta in adapter.modules.items():
        tensors |= _beside(NATIVE[part_of(module)] + module, delta)
    tensors |= {NATIVE["flux"] + name: value for name, value in adapter.replaced.items()}
    tensors |= {NATIVE["flux"] + name + ".diff": value for name, value in adapter.added.items()}
    return tensors, lambda own: {"format": "pt"}


def to_kohya(adapter: Adapter) -> tuple[Tensors, Metadata]:
    _refuse("kohya", "norms", [*adapter.replaced, *adapter.added])
    tensors: Tensors = {}
    for module, delta in adapter.modules.items():
        tensors |= _beside(KOHYA[part_of(module)] + module.replace(".", "_"), delta)
    return tensors, _kohya_metadata


def _beside(stem: str, delta: Delta) -> Tensors:
    """One module's tensors in the words that kohya, LyCORIS and ComfyUI share."""
    change, out = delta.change, {}
    if isinstance(change, LowRank):
        out = {"lora_down.weight": change.down, "lora_up.weight": change.up, "alpha": mx.array(change.alpha)}
    elif isinstance(change, Kronecker):  # alpha would count only for a factor that is a product itself
        w1, w2 = fold(change.scale, change.w1, change.w2)
        out = {"lokr_w1": w1, "lokr_w2": w2}
    elif isinstance(change, Dense):
        out = {"diff": change.weight}
    if delta.magnitude is not None:
        out["dora_scale"] = delta.magnitude[:, None]
    if delta.bias is not None:
        out["diff_b"] = delta.bias
    return {f"{stem}.{name}": value for name, value in out.items()}


def _kohya_metadata(own: Mapping[str, str]) -> dict[str, str]:
    """What sd-scripts writes and other programs show."""
    base = own.get(OWN + "base_model")
    out = {
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "modelspec.architecture": f"flux-1-{base}/lora" if base else "flux-1/lora",
    }
    names = {"ss_network_dim": "rank", "ss_network_alpha": "alpha"} | {k: n for n, k in KOHYA_FACTS.items()}
    return out | {theirs: own[OWN + ours] for theirs, ours in names.items() if OWN + ours in own}


# --- diffusers': split layers, alpha folded in, PEFT's config in the header ---


def to_diffusers(adapter: Adapter) -> tuple[Tensors, Metadata]:
    """Alpha is folded into the matrices: a reader that ignores the header then gets the same strength."""
    modules = adapter.modules
    no_lora = [name for name, delta in modules.items() if not isinstance(delta.change, LowRank)]
    _refuse("diffusers", "changes that are not of low rank", no_lora)
    _refuse("diffusers", "T5 layers", [name for name in modules if part_of(name) == "t5"])
    _refuse("diffusers", "added norms", list(adapter.added))
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for part in ("flux", "clip"):
        prefix = DIFFUSERS_PARTS[part]
        own = {
            name: d
            for module, delta in adapter.part(part).modules.items()
            for name, d in _parts(module, delta)
        }
        if own:
            tensors |= _peft_tensors(prefix, own)
            config |= {f"{prefix}.{name}": value for name, value in _peft_config(own).items()}
    for name, value in adapter.replaced.items():
        _, (theirs,) = find_theirs(TRANSFORMER, name.removesuffix(".scale"))
        tensors[f"transformer.{theirs}.weight"] = value
    packed = json.dumps(config, indent=2, sort_keys=True)
    return tensors, lambda own: {"format": "pt", PEFT_METADATA: packed}


def _parts(module: str, delta: Delta) -> list[tuple[str, Delta]]:
    """A module's change under diffusers' names: [(name, change with alpha equal to the rank)]."""
    found = find_theirs(TRANSFORMER, module)
    if found is None:
        return [(module, Delta(folded(delta.change), delta.bias, delta.magnitude))]
    row, theirs = found
    if row.swapped:
        delta = swap_halves(delta)
    cuts = [delta.shape[1] * i for i in range(1, len(theirs))]  # q, k and v have as many rows as columns
    deltas = split(delta, cuts) if cuts else [delta]
    return [
        (name, Delta(folded(d.change), d.bias, d.magnitude)) for name, d in zip(theirs, deltas, strict=True)
    ]


def _peft_tensors(prefix: str, deltas: Mapping[str, Delta]) -> Tensors:
    out: Tensors = {}
    biased = any(delta.bias is not None for delta in deltas.values())
    whole = [
        name
        for name, delta in deltas.items()
        if delta.magnitude is None or mx.any(mx.isnan(delta.magnitude)).item()
    ]
    if len(whole) < len(deltas):
        _refuse("diffusers", "layers without DoRA beside layers with it", whole)
    for name, delta in deltas.items():
        stem = f"{prefix}.{name}"
        out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = delta.change.down, delta.change.up
        if biased:  # PEFT knows biases for all layers or for none
            zeros = mx.zeros((delta.shape[0],), dtype=delta.change.up.dtype)
            out[f"{stem}.lora_B.bias"] = zeros if delta.bias is None else delta.bias
        if delta.magnitude is not None:
            out[f"{stem}.lora_magnitude_vector"] = delta.magnitude
    return out


def _peft_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """PEFT's LoraConfig for these layers, with alpha equal to the rank everywhere.

    PEFT matches names from their end. CLIP's layers go without `text_model.`, which newer versions of
    transformers do not have; the transformer's `proj_out` is told from the blocks' by its start.
    """
    names = {name: name.removeprefix("text_model.") for name in deltas}
    ranks = {names[name]: delta.change.rank for name, delta in deltas.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    start = "" if names.keys() != set(names.values()) else "^"
    odd = {start + name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "use_dora": any(delta.magnitude is not None for delta in deltas.values()),
        "lora_bias": any(delta.bias is not None for delta in deltas.values()),
    }


def _refuse(format: str, what: str, modules: list[str]) -> None:
    if modules:
        raise FluxError(f"{format} files have no place for {what}: {some(modules)}")


WRITERS: dict[str, Callable[[Adapter], tuple[Tensors, Metadata]]] = {
    "native": to_native,
    "kohya": to_kohya,
    "diffusers": to_diffusers,
}
