"""What a model is: its row of the registry, and what its configs say otherwise."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux import jsonfiles, sampler
from flux.errors import FluxError
from flux.sampler import AnyShift, Shift
from flux.weights import registry
from flux.weights.contents import Found, look
from flux.weights.fit import fit_row, input_kind
from flux.weights.layouts import TAKES, Part, read_config
from flux.weights.registry import ModelSpec

DEFAULTS = "defaults.json"  # in a folder that this program wrote: the model's defaults
SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"
MAX_STEPS, MAX_TOKENS = 10_000, 4096  # that a folder's defaults may ask for
GUIDANCE = ("guidance_in.", "guidance_embedder.")  # of the names of that input's layers
# What schedulers can do beyond FLUX.1's, and the value that leaves it out.
BEYOND: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}


def spec_of(folder: Path, transformer: Part, spec: ModelSpec | None, name: str) -> ModelSpec:
    """The registry's row for a model, with what its scheduler's config and its defaults.json say otherwise.

    spec: where the model was asked for by its name in the registry; the transformer may be another one's.
    name: of the folder or repository. Warns where a guess must do. FluxError for a transformer that is given
    something that this program cannot give, or something else than the model that was asked for.
    """
    shift = _shift(folder / SCHEDULER)
    found = look(transformer.files)
    file = transformer.files[0].stem
    kind = _input_kind(found, transformer.label)
    if spec is None:
        spec = _row(found, transformer, shift, f"{name} {file} {class_name(folder)}", kind)
    elif spec.repo and "kontext" in registry.words(file) and spec.input == registry.TEXT:
        spec = registry.get("kontext")
    else:
        spec = fit_row(spec, kind, transformer.label)
    if shift is not None:
        spec = replace(spec, shift=shift)
    return _defaults(folder / DEFAULTS, spec)


def _input_kind(found: Found, label: str) -> str:
    """What a transformer is given, by its header: text alone, where packed weights do not show it."""
    channels = found.axis("transformer", *TAKES["picture"]), found.axis("transformer", *TAKES["ae"])
    taken, given = channels
    return registry.TEXT if taken is None or given is None else input_kind(taken, given, label)


def _row(found: Found, transformer: Part, shift: AnyShift | None, name: str, kind: str) -> ModelSpec:
    """The row for a transformer that has none; with a line where neither its configs nor its name tell."""
    has_guidance = any(sign in entry for entry in found.entries for sign in GUIDANCE)
    shifted = None if shift is None else shift is not False
    spec = registry.of_file(name, has_guidance, shifted, kind)
    known = shift is not None or registry.words(name) & {"schnell", "dev", "krea"}
    if not has_guidance and not known and kind == registry.TEXT:
        warnings.warn(
            f"{transformer.label}: takes no guidance, and no scheduler_config.json says how it was trained: "
            "its steps and times are schnell's; --shift dev --steps 28 gives it dev's",
            stacklevel=2,
        )
    if not has_guidance and spec.name != "schnell":
        warnings.warn(
            f"{transformer.label}: a {spec.name} without guidance: --cfg-scale 3.5 guides instead",
            stacklevel=2,
        )
    return spec


def _shift(path: Path) -> AnyShift | None:
    """How a scheduler_config.json shifts times; None without one. Warns of what else it asks for."""
    config = read_config(path)
    if not config:
        return None
    beyond = [
        f"{key} {jsonfiles.shown(config[key])}"
        for key, usual in BEYOND.items()
        if config.get(key, usual) != usual
    ]
    kind = str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    if not kind.startswith("FlowMatch"):
        beyond.append(jsonfiles.shown(kind).strip("'"))
    if beyond:
        warnings.warn(f"{path}: not done here: {', '.join(beyond)}", stacklevel=2)
    try:
        if config.get("use_dynamic_shifting"):
            keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
            shift = Shift(*(config.get(k, v) for k, v in zip(keys, sampler.DEV_SHIFT, strict=True)))
            return shift == sampler.DEV_SHIFT or sampler.read_shift(shift)
        factor = sampler.read_shift(config.get("shift", 1.0))
        return factor if factor != 1 else False
    except (FluxError, TypeError, ZeroDivisionError):
        raise FluxError(f"{path}: its shift is not a time shift: {jsonfiles.shown(config)}") from None


def class_name(folder: Path) -> str:
    """The pipeline that a diffusers folder is made for, "" where nothing says so."""
    return str(read_config(folder / INDEX).get("_class_name", ""))


def _defaults(path: Path, spec: ModelSpec) -> ModelSpec:
    """The row with what the folder's defaults.json, if any, says otherwise."""
    if not path.is_file():
        return spec
    values = jsonfiles.read(path)
    said = values.get("input", spec.input)
    if said not in registry.INPUTS:
        wanted = ", ".join(registry.INPUTS)
        raise FluxError(f"{path}: input should be one of {wanted}, not {jsonfiles.shown(said)}")
    if spec.input not in (registry.TEXT, said):
        return spec  # they are of the folder's own transformer, which another one stands for here
    try:
        shift = sampler.read_shift(values.pop("shift", spec.shift))
    except FluxError as error:
        raise FluxError(f"{path}: {error}") from None
    found = replace(spec, shift=shift, **jsonfiles.fields(ModelSpec, values, str(path)))
    jsonfiles.count(found.steps, f"{path}: steps", most=MAX_STEPS)
    jsonfiles.count(found.t5_length, f"{path}: t5_length", most=MAX_TOKENS)
    return found
