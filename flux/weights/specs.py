"""What a model is: its row of the registry, and what its configs say otherwise."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux import jsonfiles, sampler
from flux.errors import FluxError
from flux.sampler import AnyShift, Shift
from flux.weights import registry
from flux.weights.contents import look
from flux.weights.layouts import Part, read_config
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

    spec: where the model was asked for by its name in the registry. name: of the folder or repository.
    Warns where a guess must do.
    """
    shift = _shift(folder / SCHEDULER)
    if spec is None:
        spec = _kind(transformer, shift, f"{name} {transformer.files[0].stem}")
        _warn_of_kontext(folder, transformer, name)
    if shift is not None:
        spec = replace(spec, shift=shift)
    return _defaults(folder / DEFAULTS, spec)


def _kind(transformer: Part, shift: AnyShift | None, name: str) -> ModelSpec:
    """The row for a transformer that has none; with a line where neither its configs nor its name tell."""
    entries = look(transformer.files).entries
    has_guidance = any(sign in entry for entry in entries for sign in GUIDANCE)
    shifted = None if shift is None else shift is not False
    spec = registry.of_file(name, has_guidance, shifted)
    known = shift is not None or registry.words(name) & {"schnell", "dev", "krea"}
    if not has_guidance and not known:
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


def _warn_of_kontext(folder: Path, transformer: Part, name: str) -> None:
    said = registry.words(f"{name} {transformer.files[0].stem} {class_name(folder)}")
    if "kontext" in said:
        warnings.warn(
            f"{transformer.label}: FLUX.1 Kontext changes a picture, and none is given to it here: "
            "it makes pictures from the text alone, as dev does",
            stacklevel=2,
        )


def class_name(folder: Path) -> str:
    """The pipeline that a diffusers folder is made for, "" where nothing says so."""
    return str(read_config(folder / INDEX).get("_class_name", ""))


def _defaults(path: Path, spec: ModelSpec) -> ModelSpec:
    """The row with what the folder's defaults.json, if any, says otherwise."""
    if not path.is_file():
        return spec
    values = jsonfiles.read(path)
    try:
        shift = sampler.read_shift(values.pop("shift", spec.shift))
    except FluxError as error:
        raise FluxError(f"{path}: {error}") from None
    found = replace(spec, shift=shift, **jsonfiles.fields(ModelSpec, values, str(path)))
    jsonfiles.count(found.steps, f"{path}: steps", most=MAX_STEPS)
    jsonfiles.count(found.t5_length, f"{path}: t5_length", most=MAX_TOKENS)
    return found
