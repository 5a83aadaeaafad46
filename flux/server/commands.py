"""From a request to the program that answers it: its words and its options, checked by its tables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.server import results
from flux.server.folders import Folders, checked, existing, inside
from flux.server.jobs import New
from flux.server.problems import absent, conflict, wrong
from flux.server.settings import Settings
from flux.training.finetune import Options, begin
from flux.training.finetune.arguments import table_options
from flux.training.finetune.foreign_options import OURS
from flux.weights import registry
from flux.weights.checkpoints import REPOSITORY

DETAIL = "Describe this image in detail."  # the default prompt, for which the captioner has a task
# What a training takes from models/ by itself, where it is there.
USUAL_FILES = {
    "transformer": "flux1-dev.sft",
    "clip": "clip_l.safetensors",
    "t5": "t5xxl_fp16.safetensors",
    "ae": "ae.sft",
}
PARTS = tuple(USUAL_FILES)
# Options that clients may not give: they name files and folders.
SET_HERE = ("data", "config", "options", "resume", "output_dir", "cache_dir", "name", "mask_dir")
CAPTIONER = "florence2"  # the folder in models/


def train(folders: Folders, request: Mapping[str, Any], id: str) -> tuple[New, list[str]]:
    """The job of a training, and what is not used of the request, a line each.

    Problem, with every fault, for a request that dreambooth.py would refuse.
    """
    name = checked(request["output_name"])
    dataset = request.get("dataset") or name
    config = existing(folders.config(dataset), f"dataset config {dataset}: /create-dataset-config makes it")
    rest = {key: value for key, value in request.items() if key not in ("output_name", "dataset", "id")}
    rest = {key.replace("-", "_"): value for key, value in rest.items() if value is not None}
    if tables := [key for key, value in rest.items() if isinstance(value, Mapping)]:
        raise wrong(f"{tables[0][:40]!a} should be an option with a value, not a table")
    options = {**_plain(folders, rest), **_networks(folders, rest)}
    options |= {"config": str(config), "output_dir": str(folders.output(name)), "name": name}
    given, notes = table_options(options)
    checked_options = Options(**given)
    try:
        begin(checked_options, Ranks.alone())
    except FluxError as error:
        choice = f"resume its job, DELETE /outputs/{name}, or take another output_name"
        raise conflict(f"no new run can begin in outputs/{name}: {choice} ({error})") from None
    return New("train", name, id, dict(request), ("dreambooth",), options), notes


def _plain(folders: Folders, request: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name no file, by the names that they came with."""
    options: dict[str, Any] = {}
    for key, value in request.items():
        ours = OURS.get(key, key)
        if ours in SET_HERE:
            raise wrong(f"{key} is set by the server: leave it out")
        if ours in ("adapter", "adapters"):
            options["adapter"] = [f"{file}:{strength:g}" for file, strength in adapters(folders, value)]
        elif ours not in ("model", "pretrained_model", "full_bf16", *PARTS):
            options[key] = value
    if request.get("full_bf16"):
        options.setdefault("dtype", "bfloat16")
    return options


def _networks(folders: Folders, request: Mapping[str, Any]) -> dict[str, str]:
    """The options that name the model and files of its parts."""
    ours = {OURS.get(key, key): value for key, value in request.items()}
    files = {part: _model_file(folders, ours[part]) for part in PARTS if part in ours}
    name = ours.get("model") or request.get("pretrained_model")
    if name is not None:
        return {**files, "model": model(folders, name)}
    usual = {part: folders.models / file for part, file in USUAL_FILES.items()}
    there = {part: str(path) for part, path in usual.items() if path.is_file()}
    if "transformer" not in there:
        return files
    transformer = files.pop("transformer", there.pop("transformer"))
    return {**there, **files, "model": transformer}


def model(folders: Folders, name: Any) -> str:
    """A model as the programs find it: of the registry, in models/, or a repository of the Hub."""
    if not isinstance(name, str):
        raise wrong(f"a model is named by a text, not {name!r:.50}")
    if registry.find(name):
        return name
    path = inside(folders.models, name)
    if path.exists():
        return str(path)
    if re.fullmatch(REPOSITORY, name):
        return name
    known = ", ".join(spec.name for spec in registry.MODELS)
    raise absent(f"there is no model {name[:100]!a}: known are {known}, and what is in models/")


def _model_file(folders: Folders, name: Any) -> str:
    if not isinstance(name, str):
        raise wrong(f"a model's file is named by a text, not {name!r:.50}")
    return str(existing(inside(folders.models, name), f"file {name[:100]!a} in models/"))


def adapters(folders: Folders, value: Any) -> list[tuple[str, float]]:
    """(file, strength) of adapters that are given as {name, strength}, or as "name:strength"."""
    found = []
    for each in value if isinstance(value, list | tuple) else [value]:
        table = each if isinstance(each, Mapping) else _split(each)
        name, strength = table.get("name"), table.get("strength", 1.0)
        if not isinstance(name, str) or isinstance(strength, bool) or not isinstance(strength, int | float):
            raise wrong('an adapter is {"name": a run or a file, "strength": a number}')
        found.append((str(adapter(folders, name)), float(strength)))
    return found


def _split(text: Any) -> dict[str, Any]:
    """Of "name:strength", where the strength may be left out."""
    name, _, strength = str(text).rpartition(":")
    try:
        return {"name": name, "strength": float(strength)} if name else {"name": text}
    except ValueError:
        return {"name": text}


def adapter(folders: Folders, name: str) -> Path:
    """The file of an adapter: of a run, NAME/FILE under outputs/, or a file in models/."""
    path = inside(folders.outputs, name)
    candidates = [path / f"{path.name}.safetensors", path, path.with_name(f"{path.name}.safetensors")]
    candidates += [inside(folders.models, name)]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    made = results.adapters(path) if path.is_dir() else []
    more = f"; the run has {', '.join(file.name for file in made[-5:])}" if made else ""
    raise absent(f"there is no adapter {name[:100]!a} in outputs/ or models/{more}")


def caption(settings: Settings, request: Mapping[str, Any], id: str) -> New:
    """The job of captioning a dataset."""
    folders, name = settings.folders, request["output_name"]
    folder = existing(folders.dataset(name), f"dataset {name}")
    prompt = request["prompt"]
    words = ["caption", str(folder), "--format=txt", f"--model={_captioner(settings)}"]
    words += ["--task=detailed"] if prompt == DETAIL else [f"--prompt={prompt}"]
    words += [f"--trigger={request['trigger_word']}"] if request.get("trigger_word") else []
    words += ["--overwrite"] if request["overwrite"] else []
    return New("caption", name, id, dict(request), tuple(words), {})


def _captioner(settings: Settings) -> str:
    folder = settings.folders.models / CAPTIONER
    return str(folder) if folder.is_dir() else settings.captioner
