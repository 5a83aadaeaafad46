"""An Adapter -> a file that other programs load: ours, kohya's, diffusers', ai-toolkit's.

What a format cannot hold is refused by name, never left out; what the programs that read the format
leave out is told to the caller.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import mlx.core as mx

from flux.adapters import changes
from flux.adapters.adapter import Adapter, part_of
from flux.adapters.formats import DORA_RULE, OWN, some
from flux.adapters.peft_config import PEFT_METADATA
from flux.adapters.peft_writer import Metadata, Tensors, refuse, split_names, to_ai_toolkit, to_diffusers
from flux.errors import FluxError
from flux.weights import tensors as files

# What a trained adapter tells about itself, after OWN, and what kohya calls the same.
FACTS = ("base_model", "trigger", "steps", "dataset_hash")
KOHYA_FACTS = {"base_model": "ss_sd_model_name", "trigger": "modelspec.trigger_phrase", "steps": "ss_steps"}
# Entries of a header that are true only of the file that they stood in.
STALE = {
    "format",
    PEFT_METADATA,
    DORA_RULE,
    "ss_network_dim",
    "ss_network_alpha",
    "lora_rank",
    "lora_blocks",
    "mflux_version",
}


def save(
    path: str | Path, adapter: Adapter, format: str, facts: Mapping[str, str] | None = None
) -> list[str]:
    """Writes the adapter whole or not at all. format: "native", "kohya", "diffusers" or "ai-toolkit".

    native: BFL's names as ComfyUI writes them, every kind of change; ComfyUI reads it, and diffusers its
    low-rank parts. facts: base_model, trigger, steps, dataset_hash; they are kept in a conversion.
    Returns what other programs that read the format leave out of it, a line each. FluxError where the format
    cannot hold a part of the adapter.
    """
    if format not in WRITERS:
        raise FluxError(f"unknown adapter format {format!r}: choose one of {', '.join(WRITERS)}")
    if unknown := set(facts or ()) - set(FACTS):
        raise FluxError(
            f"unknown facts of an adapter: {', '.join(sorted(unknown))}; known are {', '.join(FACTS)}"
        )
    tensors, metadata = WRITERS[format](adapter)
    if wrong := [name for name, tensor in tensors.items() if not mx.isfinite(tensor).all().item()]:
        raise FluxError(f"{path} is not written: {some(wrong)} would be NaN or infinity")
    entries = {
        OWN + name: str(value) for name, value in {**read_facts(adapter.metadata), **(facts or {})}.items()
    }
    kept = {name: value for name, value in adapter.metadata.items() if name not in STALE}
    ranks, alphas = adapter.ranks().values(), adapter.alphas().values()
    entries |= {OWN + "rank": _usual(ranks), OWN + "alpha": _usual(alphas)} if ranks else {}
    if any(delta.magnitude is not None and delta.rule == changes.PEFT for delta in adapter.modules.values()):
        entries[DORA_RULE] = changes.PEFT
    files.save(Path(path), tensors, {**kept, **metadata(entries), **entries})
    return losses(adapter, format)


def read_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts in a header, by our names for them or by kohya's."""
    found = {name: metadata.get(OWN + name, metadata.get(KOHYA_FACTS.get(name, ""))) for name in FACTS}
    return {name: value for name, value in found.items() if value is not None}


def _usual(values: Any) -> str:
    """The most frequent number, as text."""
    return f"{Counter(values).most_common(1)[0][0]:g}"


# --- Ours and kohya's: BFL's modules, alpha beside the matrices ---

NATIVE = {
    "flux": "diffusion_model.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
KOHYA = {"flux": "lora_unet_", "clip": "lora_te1_", "t5": "lora_te3_"}


def to_native(adapter: Adapter) -> tuple[Tensors, Metadata]:
    """Tensors under BFL's names, and what makes their metadata. FluxError for what they cannot hold."""
    _refuse_kinds("native", adapter)
    tensors: Tensors = {}
    for module, delta in adapter.modules.items():
        for stem, part in _native_parts(module, delta):
            tensors |= _beside(stem, part)
    tensors |= {NATIVE[part_of(name)] + name: value for name, value in adapter.replaced.items()}
    for name, value in adapter.added.items():
        bare, b = (name.removesuffix(".bias"), "_b") if name.endswith(".bias") else (name, "")
        tensors[f"{NATIVE[part_of(name)]}{bare.removesuffix('.weight')}.diff{b}"] = value
    return tensors, lambda facts: {"format": "pt"}


def _native_parts(module: str, delta: changes.Delta) -> list[tuple[str, changes.Delta]]:
    """[(stem, change)]: parts of unlike kinds have diffusers' names for them, which ComfyUI knows as well."""
    if not isinstance(delta.change, changes.Stack):
        return [(NATIVE[part_of(module)] + module, delta)]
    return [
        ("transformer." + name, part)
        for name, part in split_names(module, delta)
        if part.shape != (None, None)
    ]


def to_kohya(adapter: Adapter) -> tuple[Tensors, Metadata]:
    """The same under sd-scripts' names."""
    refuse("kohya", "norms", [*adapter.replaced, *adapter.added])
    modules = {name: _flat(delta) for name, delta in adapter.modules.items()}
    adapter = replace(adapter, modules=modules)
    _refuse_kinds("kohya", adapter)
    refuse("kohya", "changes of unlike kinds in one layer", _of_kind(adapter, changes.Stack))
    tensors: Tensors = {}
    for module, delta in modules.items():
        tensors |= _beside(KOHYA[part_of(module)] + module.replace(".", "_"), delta)
    return tensors, _kohya_metadata


def _flat(delta: changes.Delta) -> changes.Delta:
    """Parts of unlike kinds as one matrix, where that says the same for every base."""
    if isinstance(delta.change, changes.Stack) and delta.change.is_additive:
        return replace(delta, change=changes.Dense(delta.change.dense()))
    return delta


def _of_kind(adapter: Adapter, *kinds: type) -> list[str]:
    return [name for name, delta in adapter.modules.items() if isinstance(delta.change, kinds)]


def _refuse_kinds(format: str, adapter: Adapter) -> None:
    """Of what the words of kohya and LyCORIS cannot hold, or only what it was made from."""
    wrong = []
    for name, delta in adapter.modules.items():
        parts = (
            [part for *_, part in delta.change.parts] if isinstance(delta.change, changes.Stack) else [delta]
        )
        written = all(type(part.change) in (NoneType, *BESIDE) for part in parts)
        if not written or delta.bias_factor is not None or delta.new_bias is not None:
            wrong.append(name)
    refuse(format, "rotations, scaled biases and layers that were trained whole", wrong)


def _beside(stem: str, delta: changes.Delta) -> Tensors:
    """One module's tensors in the words that kohya, LyCORIS and ComfyUI share."""
    out = {} if delta.change is None else BESIDE[type(delta.change)](delta.change)
    if delta.magnitude is not None:
        out["dora_scale"] = delta.magnitude if delta.magnitude.ndim == 2 else delta.magnitude[:, None]
    if delta.bias is not None:
        out["diff_b"] = delta.bias
    return {f"{stem}.{name}": value for name, value in out.items()}


def _hadamard(change: changes.Hadamard) -> Tensors:
    factors = {"hada_w1_a": change.a1, "hada_w1_b": change.b1, "hada_w2_a": change.a2, "hada_w2_b": change.b2}
    return factors | {"alpha": mx.array(change.scale * change.b1.shape[0])}


def _kronecker(change: changes.Kronecker) -> Tensors:
    """Without alpha, which would count only for a factor that is a product itself."""
    return dict(zip(("lokr_w1", "lokr_w2"), changes.fold(change.scale, change.w1, change.w2), strict=True))


def _glora(change: changes.GLoRA) -> Tensors:
    factors = {f"{name}.weight": getattr(change, name) for name in ("a1", "a2", "b1", "b2")}
    return factors | {"alpha": mx.array(change.scale * change.b2.shape[0])}


# How each kind of change is written beside a module's name.
BESIDE: dict[type, Callable[[Any], Tensors]] = {
    changes.LowRank: lambda c: {
        "lora_down.weight": c.down,
        "lora_up.weight": c.up,
        "alpha": mx.array(c.alpha),
    },
    changes.Hadamard: _hadamard,
    changes.Kronecker: _kronecker,
    changes.Dense: lambda c: {"diff": c.weight},
    changes.GLoRA: _glora,
    changes.Scaling: lambda c: {"weight": c.factor.reshape(-1), "on_input": mx.array(c.factor.shape[0] == 1)},
}


def _kohya_metadata(facts: Mapping[str, str]) -> dict[str, str]:
    """What sd-scripts writes and other programs show."""
    base = facts.get(OWN + "base_model")
    out = {
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "modelspec.architecture": f"flux-1-{base}/lora" if base else "flux-1/lora",
    }
    names = {"ss_network_dim": "rank", "ss_network_alpha": "alpha"} | {k: n for n, k in KOHYA_FACTS.items()}
    return out | {theirs: facts[OWN + ours] for theirs, ours in names.items() if OWN + ours in facts}


# --- What the readers of a format leave out, seen in sd-scripts and in diffusers 0.42 ---


def losses(adapter: Adapter, format: str) -> list[str]:
    """What programs that read the format leave out of such a file; a line each."""
    if format not in ("native", "kohya"):
        return []
    found, who = [], "diffusers" if format == "native" else "diffusers and sd-scripts"
    outside = [
        name for name in adapter.part("flux").modules if not re.match(r"(double|single)_blocks\.", name)
    ]
    if outside:
        found.append(f"{who} will leave out the layers outside of the blocks ({some(outside)})")
    if any(_has_magnitude(delta) for delta in adapter.modules.values()):
        found.append(f"{who} will leave out the DoRA scales, which changes the picture")
    other = [n for n, d in adapter.modules.items() if not isinstance(d.change, changes.LowRank | NoneType)]
    if other:
        found.append(f"{who} will leave out what is not of low rank ({some(other)})")
    return [*found, "ComfyUI reads all of it"] if found else []


def _has_magnitude(delta: changes.Delta) -> bool:
    parts = [part for *_, part in delta.change.parts] if isinstance(delta.change, changes.Stack) else [delta]
    return any(part.magnitude is not None for part in parts)


WRITERS: dict[str, Callable[[Adapter], tuple[Tensors, Metadata]]] = {
    "native": to_native,
    "kohya": to_kohya,
    "diffusers": to_diffusers,
    "ai-toolkit": to_ai_toolkit,
}
