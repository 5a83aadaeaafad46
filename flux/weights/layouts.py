"""Which files of a folder are which part of a model: by what is in them; of several, by where they lie."""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux import jsonfiles
from flux.errors import FluxError
from flux.weights import prefixes, strangers
from flux.weights.contents import Found, is_shard, look, survey

PARTS = ("transformer", "ae", "clip", "t5")
NAMES = {
    "transformer": "transformer",
    "ae": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
    "controlnet": "ControlNet",
}

# Folders in which BFL, diffusers, ComfyUI and Forge keep a part, the best first; "" is the model's folder
# itself. Files elsewhere count too, after these.
SUBFOLDERS: dict[str, tuple[str, ...]] = {
    "transformer": ("", "transformer", "diffusion_models", "unet", "checkpoints", "stable-diffusion"),
    "ae": ("", "vae", "checkpoints", "stable-diffusion"),
    "clip": ("text_encoder", "text_encoders", "clip", "checkpoints", "stable-diffusion", ""),
    "t5": ("text_encoder_2", "text_encoders", "text_encoder", "clip", "checkpoints", "stable-diffusion", ""),
}
EXPECTED = {  # what the line about a missing part proposes
    "transformer": "flux1-*.safetensors, transformer/, diffusion_models/, unet/ or checkpoints/",
    "ae": "ae.safetensors, vae/",
    "clip": "text_encoder/, text_encoders/clip_l.safetensors, clip/",
    "t5": "text_encoder_2/, text_encoders/t5xxl_fp16.safetensors, clip/",
}

USUAL = {"transformer": "flux1", "ae": "ae.", "clip": "clip_l", "t5": "t5xxl"}  # how their files are called

# The subfolder whose config.json speaks of a part, also where the weights are a single file beside it.
FOLDERS = {"transformer": "transformer", "ae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}

# Widths that must agree: what the transformer takes (bare names and axes), and what another part gives.
TAKES = {
    "picture": (("img_in.weight", 1), ("x_embedder.weight", 1)),
    "ae": (("final_layer.linear.bias", 0), ("proj_out.bias", 0)),
    "clip": (("vector_in.in_layer.weight", 1), ("time_text_embed.text_embedder.linear_1.weight", 1)),
    "t5": (("txt_in.weight", 1), ("context_embedder.weight", 1)),
}
GIVES = {
    "ae": (("encoder.conv_out.bias", 0),),  # mean and variance: half of the 2x2 patches that a token is
    "clip": (("text_model.final_layer_norm.weight", 0),),
    "t5": (("encoder.final_layer_norm.weight", 0),),
}

TOKENIZERS = {
    "tokenizer": ("vocab.json", "tokenizer.json"),
    "tokenizer_2": ("spiece.model", "tokenizer.json"),
}
SHIPPED_TOKENIZERS = Path(__file__).parents[1] / "assets" / "tokenizers"


@dataclass(frozen=True)
class Part:
    """One network's files, and what a config beside them says ({} without one)."""

    kind: str  # of PARTS
    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What error lines call it: the file, or the folder of the shards."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


# Why one of several files is taken, in the order of what `_rank` returns.
REASONS = (
    "it makes a picture of a text alone",
    "it is named after the model",
    "it is in the transformer's file",
    "it is the nearest to the transformer",
    "it is in the likelier folder",
    "it has the usual name",
    "it is the larger one",
    "by its name",
)


def find_parts(folder: Path, kinds: Iterable[str], given: Mapping[str, Part], name: str) -> dict[str, Part]:
    """The parts of these kinds in a folder and the folders in it, to go with the given ones.

    Warns, in a line each, where several files fit, and of files that do not belong to such a model.
    name: of the model asked for; a transformer that is named like it comes first.
    FluxError where a part is nowhere.
    """
    files = survey(folder)
    faults = {found.files: found.fault for found in files if found.fault}
    transformer = look(given["transformer"].files) if "transformer" in given else None
    chosen: dict[str, Found] = {}
    for kind in sorted(kinds, key=PARTS.index):  # the transformer first: the others must fit it
        candidates = [found for found in files if kind in found.parts and not found.fault]
        misfits = {found.files: _misfit(kind, found, transformer) for found in candidates}
        fitting = [found for found in candidates if not misfits[found.files]]
        faults |= {key: fault for key, fault in misfits.items() if fault}
        if fitting:
            chosen[kind] = _best(folder, kind, fitting, transformer, name)
        transformer = transformer or chosen.get("transformer")
    used = {found.files for found in chosen.values()}
    passed = _passed_over([fault for key, fault in faults.items() if key not in used])
    if absent := [kind for kind in kinds if kind not in chosen]:
        raise FluxError(_missing(folder, absent, bool(chosen), passed))
    if passed:
        warnings.warn(f"{folder}: {passed}", stacklevel=2)
    return {kind: Part(kind, found.files, _config(folder, kind, found)) for kind, found in chosen.items()}


def _best(folder: Path, kind: str, fitting: list[Found], transformer: Found | None, name: str) -> Found:
    """The file to take of those that fit; warns of the choice where there are several."""

    def rank(found: Found) -> tuple[Any, ...]:
        return _rank(folder, kind, found, transformer, name)

    best, *others = sorted(fitting, key=rank)
    if others:
        pairs = zip(REASONS, rank(best), rank(others[0]), strict=True)
        reason = next(reason for reason, ours, theirs in pairs if ours != theirs)
        rest = _some([_below(folder, found) for found in others], 3)
        warnings.warn(
            f"{folder}: took {_below(folder, best)} for the {NAMES[kind]}, not {rest}: {reason}; "
            f"--{kind} FILE takes another",
            stacklevel=2,
        )
    return best


def _misfit(kind: str, found: Found, transformer: Found | None) -> str | None:
    """Why a file does not fit the transformer; None where it does, or the headers do not show it."""
    if kind == "transformer" or transformer is None:
        return None
    takes, gives = transformer.axis("transformer", *TAKES[kind]), found.axis(kind, *GIVES[kind])
    if kind == "ae" and gives is not None:
        gives *= 2
    if takes in (None, gives) or gives is None:
        return None
    return f"{found.label}: another {NAMES[kind]}, of width {gives}; the transformer takes {takes}"


def _rank(folder: Path, kind: str, found: Found, transformer: Found | None, name: str) -> tuple[Any, ...]:
    """How well a file would do for a part, in the order of REASONS; the least is the best."""
    file = found.files[0]
    named = bool(name) and name in file.stem.lower()
    within = {part.lower() for part in file.parent.relative_to(folder).parts} or {""}
    rank = min((i for i, p in enumerate(SUBFOLDERS[kind]) if p in within), default=len(SUBFOLDERS[kind]))
    usual = file.name.lower().startswith(USUAL[kind])
    near, apart, other = 0, False, False
    if kind == "transformer":
        channels = (found.axis(kind, *TAKES["picture"]), found.axis(kind, *TAKES["ae"]))
        wide = None not in channels and channels[0] != channels[1]
        other = wide or "kontext" in file.name.lower()
    elif transformer:
        apart = transformer.files != found.files
        folders = [file.parent.absolute(), transformer.files[0].parent.absolute()]
        near = len(Path(os.path.commonpath(folders)).parts)
    return other, not named, apart, -near, rank, not usual, -found.size, str(file)


def _below(folder: Path, found: Found) -> str:
    """A file's path within the folder."""
    return os.path.relpath(found.label, folder)


def _passed_over(faults: list[str]) -> str:
    """What a line says of files that do not belong to the model; "" where there are none."""
    adapters = [fault for fault in faults if strangers.ADAPTER in fault]
    told = [fault for fault in faults if fault not in adapters]
    told += [f"{len(adapters)} x {strangers.ADAPTER}"] if adapters else []
    return f"passed over: {_some(told, 5)}" if told else ""


def _some(texts: list[str], most: int) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _missing(folder: Path, absent: list[str], others: bool, passed: str) -> str:
    tail = f"; {passed}" if passed else ""
    if not others and len(absent) == len(PARTS):
        return f"{folder}: no weights here in BFL's, diffusers' or ComfyUI's layout (no transformer){tail}"
    wanted = "; ".join(f"no {NAMES[kind]} ({EXPECTED[kind]})" for kind in absent)
    options = " ".join(f"--{kind} FILE" for kind in absent)
    return f"{folder}: {wanted}: put the files there or give {options}{tail}"


# --- One file ---


def part_of_file(path: Path, kind: str) -> Part:
    """The part in a file, or in a folder such as diffusers' `transformer/`; FluxError where it has none."""
    if not path.exists():
        raise FluxError(f"{path}: no such file (for the {NAMES[kind]}), nor a folder with one")
    if path.is_dir():
        return find_parts(path, [kind], {}, "")[kind]
    found = whole(path)
    _check_part(found, kind)
    return Part(kind, found.files, read_config(path.parent / "config.json"))


def whole(path: Path) -> Found:
    """What is in a file, with all other shards where it is one of several."""
    groups = [found for found in survey(path.parent) if path in found.files] if is_shard(path) else []
    return groups[0] if groups else look([path])


def _check_part(found: Found, kind: str) -> None:
    """FluxError where a file cannot serve as this part."""
    if found.fault and (not found.foreign or kind not in found.parts or kind in ("transformer", "t5")):
        wanted = f", not a {NAMES[kind]} of FLUX.1" if found.foreign else ""
        raise FluxError(found.fault + wanted)
    if kind not in found.parts:
        held = ", ".join(NAMES[part] for part in found.parts) or "nothing that is known here"
        raise FluxError(f"{found.label}: holds no {NAMES[kind]}, but {held}")


def parts_of_file(path: Path) -> dict[str, Part]:
    """All parts in a file that is given as the model; FluxError where it has no transformer."""
    found = whole(path)
    if found.fault or "transformer" not in found.parts:
        options = " or ".join(f"--{part} FILE" for part in found.parts if not found.fault)
        fault = found.fault or f"{path}: holds no transformer, which a model begins with"
        raise FluxError(f"{fault}; to take one part from a file, use {options or '--transformer FILE'}")
    root = tree_of(path)
    return {kind: Part(kind, found.files, _config(root, kind, found)) for kind in found.parts}


def tree_of(file: Path) -> Path:
    """The folder of the model that a file belongs to: the file's, or the one above `unet/` and the like."""
    subfolders = {name for names in SUBFOLDERS.values() for name in names if name}
    parent = file.absolute().parent
    return parent.parent if parent.name.lower() in subfolders else file.parent


# --- Configs and tokenizers ---


def _config(folder: Path, kind: str, found: Found) -> dict[str, Any]:
    """What a config.json says of a part: the one beside it in its folder, or in the part's usual folder."""
    beside = found.files[0].parent
    config = read_config(beside / "config.json") if beside != folder else {}
    return config or read_config(folder / FOLDERS[kind] / "config.json")


def with_config(folder: Path, part: Part) -> Part:
    """A part from elsewhere with the config of the folder's part, where both have the same size.

    A config says what tensors do not show; of another network it would be wrong.
    """
    other = look(part.files)
    config = read_config(folder / FOLDERS[part.kind] / "config.json")
    if part.config or "config" in other.metadata or not config:
        return part
    candidates = [found for found in survey(folder) if part.kind in found.parts]
    same = any(found.elements(part.kind) == other.elements(part.kind) for found in candidates)
    return Part(part.kind, part.files, config) if same else part


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no such file."""
    return jsonfiles.read(path) if path.is_file() else {}


def find_tokenizer(folder: Path, name: str) -> Path:
    """The folder of a tokenizer ("tokenizer", "tokenizer_2"): the model's, else FLUX.1's, which ships."""
    path = folder / name
    has_files = any((path / file).is_file() for file in TOKENIZERS[name])
    return path if has_files else SHIPPED_TOKENIZERS / name


def model_folder(folder: Path) -> Path:
    """The folder of the model in a run's folder: itself, or the one in it that a training wrote.

    Of several the newest is taken, with a warning.
    """
    marks = ("model_index.json", "defaults.json")
    if any((folder / mark).is_file() for mark in marks) or next(folder.glob("*.safetensors"), None):
        return folder
    found = {path.parent for mark in marks for depth in ("*/", "*/*/") for path in folder.glob(depth + mark)}
    if not found or any((folder / name).is_dir() for name in FOLDERS.values()):
        return folder
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        warnings.warn(f"{folder}: took {newest.name}/, the newest of {len(found)} models in it", stacklevel=2)
    return newest


def why_no_model(folder: Path) -> str:
    """Why the folder of a training from scratch has no whole model in it; empty where it has, or is none."""
    if (folder / "networks.safetensors").is_file():
        return (
            f"{folder}: its decoder is SPADE's, which no layout of FLUX can hold: draw with "
            f"`python -m flux.training.pretrain.generate --model_checkpoint {folder} --text_prompts_path ...`"
        )
    if (folder / "ae.safetensors").is_file() and (folder / "checkpoints").is_dir():
        file = folder / "ae.safetensors"
        return (
            f"{folder}: an autoencoder alone, no step trained the flow; another model takes it by --ae {file}"
        )
    if next(folder.glob("checkpoints/*/progress.json"), None):
        return f"{folder}: its training has not finished: go on with the same command and --resume"
    return ""


def foreign_tensors(parts: Iterable[Part]) -> list[str]:
    """For every file with tensors that no network takes a line that names them."""
    lines = []
    for files in dict.fromkeys(part.files for part in parts):
        found = look(files)
        if foreign := prefixes.foreign_names(found.entries):
            lines.append(f"{found.label}: passed over, as no network here takes them: {_some(foreign, 6)}")
    return lines
