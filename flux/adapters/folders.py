"""Which files of a folder are adapters: a trainer's output, PEFT's or diffusers' folder."""

import glob
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from flux.adapters import names
from flux.errors import FluxError
from flux.weights.checkpoints import find_adapter
from flux.weights.headers import read_header

PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"  # as PEFT itself saves
FOLDER_FILES = tuple(
    f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in ("pytorch_lora_weights", PEFT_STEM)
)
WEIGHTS = {
    "weight",
    "whole weight",
    "new bias",
    "replacement",
    "alpha",
}  # what files that are not adapters have as well
# What a checkpoint's name ends with.
STEP = r"(?:[-_]?(?:step|epoch|e|s)?[-_]?\d{2,}|[-_](?:step|epoch)[-_]?\d+)$"


def adapter_file(path: Path) -> Path:
    """The adapter that a path stands for: the file itself; of a folder the one of diffusers or PEFT, else the
    trainer's last one. FluxError for a folder without one, or where none of several is the last.
    """
    if not path.is_dir():
        return path
    found = _adapters(path) or _checkpoints(path)[-1:]
    if not found:
        raise FluxError(
            f"{path}: a folder without an adapter ({', '.join(FOLDER_FILES[:2])} or *.safetensors)"
        )
    last = [file for file in found if not re.search(STEP, file.stem)]
    if len(last) != 1 and len({re.sub(STEP, "", file.stem) for file in found}) > 1:
        shown = ", ".join(file.name for file in found[:8])
        raise FluxError(f"{path}: a folder with several adapters; give one of them: {shown}")
    if len(found) > 1:
        warnings.warn(f"{path}: {found[-1].name}, the last of {len(found)} adapters", stacklevel=3)
    return found[-1]


def adapter_files(patterns: Iterable[str | Path]) -> list[Path]:
    """The adapters of files (the Hub's too), folders (all in one) and patterns such as `loras/*dog*`.

    In order. FluxError for a pattern or a folder without any.
    """
    out: list[Path] = []
    for pattern in map(str, patterns):
        if not Path(pattern).exists() and glob.has_magic(pattern):
            paths = [Path(name) for name in sorted(glob.glob(pattern))]
            if not paths:
                raise FluxError(f"{pattern}: no file has such a name")
        else:
            paths = [find_adapter(pattern)]
        for path in paths:
            found = (_adapters(path) or _checkpoints(path)) if path.is_dir() else [path]
            if not found:
                raise FluxError(f"{path}: a folder without an adapter")
            out += found
    return list(dict.fromkeys(out))


def _adapters(folder: Path) -> list[Path]:
    """The one of diffusers or PEFT, else all adapters of a folder, by steps, the one without last."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return [folder / name]
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    return sorted(filter(_is_adapter, files), key=_order)


def _checkpoints(folder: Path) -> list[Path]:
    """Those of a training that keeps each checkpoint in another folder."""
    folders = sorted((path for path in folder.glob("checkpoint*") if path.is_dir()), key=_order)
    return [found[-1] for path in folders if (found := _adapters(path))]


def _order(path: Path) -> tuple[float, str]:
    """Checkpoints by the epoch or step in their name, and the last adapter, which has none, after them."""
    numbers = re.findall(r"\d+", match[0]) if (match := re.search(STEP, path.stem)) else []
    return (int(numbers[-1]) if numbers else float("inf"), path.stem)


def _is_adapter(path: Path) -> bool:
    """Whether a file has tensors that only adapters have."""
    try:
        found = (names.find(name) for name in read_header(path).tensors)
        return any(key and key.role not in WEIGHTS for key in found)
    except FluxError:
        return False
