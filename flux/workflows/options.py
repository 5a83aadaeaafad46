"""A workflow as this program's options: its files found, its values under the options' names."""

import math
import shlex
from collections.abc import Collection
from pathlib import Path

from flux.workflows.comfyui import T5_LENGTH, Workflow, locate


def to_options(workflow: Workflow, model: str | None, given: Collection[str] = ()) -> dict[str, object]:
    """Values by the options' names: those that give ComfyUI's picture, where there is no other.

    model: ComfyUI's folder or its models/, in which the files are; None for the current folder. Any other
    model stands for the workflow's, except for its LoRAs. given: options that are not to be looked for.
    FluxError for a file that is not there.
    """
    folder = Path(model or ".").expanduser()
    files: dict[str, object] = {}
    if folder.is_dir():
        files = {
            part: str(locate(name, kind, folder))
            for part, (name, kind) in workflow.files.items()
            if part not in given
        }
    adapters = [] if "adapter" in given else workflow.adapters
    root = folder if folder.is_dir() else Path()
    return {
        "model": model or ".",
        **files,
        "adapter": "\n".join(f"{locate(name, 'adapter', root)}:{strength}" for name, strength in adapters),
        "clip_prompt": workflow.clip_prompt,
        "negative_prompt": workflow.negative_prompt,
        "guidance": workflow.guidance,
        "cfg_scale": workflow.cfg_scale,
        "steps": workflow.steps,
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
        values = str(value).split("\n") if name == "adapter" else [value]
        words += [f"--{name.replace('_', '-')}={value}" for value in values if value not in (None, "")]
    return shlex.join([*words, *prompts])
