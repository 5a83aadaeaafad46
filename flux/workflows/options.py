"""A workflow as this program's options: its files found, its values under the options' names."""

import math
import shlex
from collections.abc import Collection
from pathlib import Path

from flux.errors import FluxError
from flux.workflows.comfyui import FOLDERS, T5_LENGTH, Workflow, locate


def to_options(workflow: Workflow, model: str | None, given: Collection[str] = ()) -> dict[str, object]:
    """Values by the options' names: those that give ComfyUI's picture, where there is no other.

    model: ComfyUI's folder or its models/, in which the files are; None for the current folder. Any other
    model stands for the workflow's, except for its LoRAs. given: options that are not to be looked for.
    FluxError that names all files that are not there.
    """
    folder = Path(model or ".").expanduser()
    wanted = [(part, *file, "") for part, file in workflow.files.items() if folder.is_dir()]
    wanted += [("adapter", name, "adapter", f":{strength}") for name, strength in workflow.adapters]
    wanted += [("reference", name, "picture", "") for name in workflow.references]
    folder = folder if folder.is_dir() else Path()
    files: dict[str, str] = {}
    missing = []
    for part, name, kind, strength in wanted:
        if part in given:
            continue
        if path := locate(name, kind, folder):
            files[part] = "\n".join([*filter(None, [files.get(part)]), f"{path}{strength}"])
        else:
            missing.append(f"{name} (in {' or '.join(f'{sub}/' for sub in FOLDERS[kind])}; or --{part} FILE)")
    if missing:
        raise FluxError(
            f"the workflow's files are not below {folder}: {', '.join(missing)}; "
            f"name ComfyUI's models folder with --model, or take a model by its name, such as --model dev"
        )
    return {
        "model": model or ".",
        **files,
        "clip_prompt": workflow.clip_prompt,
        "negative_prompt": workflow.negative_prompt,
        "guidance": workflow.guidance,
        "cfg_scale": workflow.cfg_scale,
        "steps": workflow.steps,
        "solver": workflow.solver,
        "schedule": workflow.schedule,
        "shift": None if workflow.shift is None else repr(math.exp(workflow.shift)),
        "image_size": workflow.image_size,
        "seed": workflow.seed,
        "n_images": workflow.n_images,
        "noise": "torch",
        "rounding": "comfyui",
        "t5_padding": T5_LENGTH,
    }


def shown(options: dict[str, object], prompts: Collection[str]) -> str:
    """The options as a command line, which makes the same picture."""
    words = []
    for name, value in options.items():
        if isinstance(value, tuple):
            value = "x".join(map(str, value))
        values = str(value).split("\n") if name in ("adapter", "reference") else [value]
        words += [f"--{name.replace('_', '-')}={value}" for value in values if value not in (None, "")]
    return shlex.join([*words, *prompts])
