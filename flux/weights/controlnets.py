"""Which file is a ControlNet of FLUX.1, by its tensors; what else it is, in a line."""

from pathlib import Path

from flux.errors import FluxError
from flux.weights import layouts, strangers
from flux.weights.contents import Found, survey
from flux.weights.layouts import NAMES, Part

KIND = "controlnet"


def part_of(path: Path) -> Part:
    """The ControlNet in a file, or in a folder that holds one; FluxError that says what is there instead."""
    if not path.exists():
        raise FluxError(f"{path}: no such file (for the ControlNet), nor a folder with one")
    found = _in_folder(path) if path.is_dir() else layouts.whole(path)
    _check(found)
    return Part(KIND, found.files, layouts.read_config(found.files[0].parent / "config.json"))


def _in_folder(folder: Path) -> Found:
    """A folder's only ControlNet, or the only file of weights that it has."""
    files = survey(folder)
    found = [file for file in files if KIND in file.parts] or files
    if len(found) != 1:
        names = ", ".join(file.files[0].name for file in found[:8]) or "no weights"
        raise FluxError(f"{folder}: {names} there; choose a file with --controlnet FILE")
    return found[0]


def _check(found: Found) -> None:
    """FluxError where a file cannot serve as a ControlNet."""
    if found.fault and (not found.foreign or KIND not in found.parts):
        raise FluxError(f"{found.fault}, no ControlNet of FLUX.1" if found.foreign else found.fault)
    if KIND not in found.parts:
        held = " and ".join(f"a {NAMES[part]}" for part in found.parts) or "nothing that is known here"
        raise FluxError(f"{found.label}: holds no ControlNet, but {held}")
    if model := strangers.model(found.entries, besides=strangers.CONTROLNET):
        raise FluxError(f"{found.label}: a ControlNet of {model}, not of FLUX.1")
