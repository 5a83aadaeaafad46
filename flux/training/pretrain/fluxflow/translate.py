"""FluxFlow's config files, read into our keys.

FluxFlow (github.com/danny-mio/fluxflow-training) trains another kind of network with a pipeline of the same
sort. Its keys are renamed, its sizes become sizes of FLUX's networks, and what has no effect here is said by
name. A file in our keys stays as it is.
"""

import copy
from collections.abc import Mapping
from typing import Any

from flux.tables import Faults, field_names
from flux.training.pretrain.config import Data, Model, Output, Step, Training
from flux.training.pretrain.fluxflow.names import (
    COMPONENTS,
    FROZEN,
    LOADING,
    METRICS,
    MOVED,
    RENAMED,
    STEP_TABLES,
    SWITCHES,
    UNFREEZABLE,
    UNUSED,
    Notes,
    Table,
    drop_unused,
    misspelt,
    rename,
)
from flux.training.pretrain.fluxflow.optimization import optimization
from flux.training.pretrain.fluxflow.sizes import SIZES, networks


def translate(raw: Mapping[str, Any], faults: Faults) -> tuple[Table, list[str]]:
    """The tables in our keys, and lines that say what of FluxFlow's has no effect.

    What is neither its nor ours stays for the reader to name. Tables that are none are left to it, too.
    """
    tables, notes = copy.deepcopy(dict(raw)), Notes()
    _move(tables)
    for name, change in (("model", _model), ("data", _data), ("output", _output)):
        if isinstance(tables.get(name), dict):
            change(tables, name, faults, notes)
    _datasets(tables, faults, notes)
    _steps(tables, faults, notes, any(size in (raw.get("model") or {}) for size in SIZES))
    _drop_loading(tables)
    return tables, notes.lines()


def _move(tables: Table) -> None:
    """Puts what stands elsewhere in FluxFlow's files into the section that it has here."""
    training = tables.get("training")
    if not isinstance(training, dict):
        return
    for name in [name for name in MOVED if name in training]:
        tables.setdefault("output", {}).setdefault(name, training.pop(name))
    pipeline = training.get("pipeline")
    for name in ("datasets", "default_dataset"):
        if isinstance(pipeline, dict) and name in pipeline:
            tables.setdefault(name, pipeline.pop(name))
    if isinstance(pipeline, dict) and pipeline.get("mode") == "sequential":
        del pipeline["mode"]  # the one that there is
    optimization = tables.pop("optimization", None)
    if isinstance(optimization, dict) and optimization.get("optim_sched_config"):
        training.setdefault("optim_sched_config", optimization["optim_sched_config"])


# --- model ---


def _model(tables: Table, name: str, faults: Faults, notes: Notes) -> None:
    table = tables[name]
    drop_unused(table, "model", name, notes)
    misspelt(table, name, [*SIZES, *UNUSED["model"]], field_names(Model), faults)
    given = {size: table.pop(size) for size in SIZES if size in table}
    if not given:
        return
    wrong = [
        f"{size}: {n!r} must be a multiple of 4 from 8 on"
        for size, n in given.items()
        if n is not None and (not isinstance(n, int) or n < 8 or n % 4)
    ]
    for line in wrong:
        faults.add(name, line)
    if not wrong:
        numbers = SIZES | {size: n for size, n in given.items() if n is not None}
        for part, sizes in networks(**numbers).items():
            table[part] = sizes | (table.get(part) or {})


# --- data ---


def _data(tables: Table, name: str, faults: Faults, notes: Notes) -> None:
    data = tables[name]
    if data.pop("channels", None) not in (None, 3):
        faults.add(f"{name}.channels", "must be 3: pictures are RGB")
    streams = bool(data.pop("use_webdataset", False)) | bool(data.pop("use_tt2m", False))
    data.pop("tt2m_token", None)
    shards = {key: data.pop(key) for key in RENAMED["dataset"] if key in data}
    if streams:
        for key in ("data_path", "captions_file"):
            data.pop(key, None)
        tables.setdefault("datasets", {})["data"] = {"type": "webdataset", **shards}
        drop_unused(data, "data", name, notes)
    else:
        for key in [key for key in data if key.startswith("webdataset_")]:
            del data[key]
        drop_unused(data, "data", name, notes)
    theirs = [*UNUSED["data"], *SWITCHES, *RENAMED["dataset"]]
    misspelt(data, name, theirs, field_names(Data), faults)


def _datasets(tables: Table, faults: Faults, notes: Notes) -> None:
    datasets = tables.get("datasets")
    for name, table in datasets.items() if isinstance(datasets, dict) else ():
        if not isinstance(table, dict):
            continue
        where = f"datasets.{name}"
        if table.get("type", "local") == "noise":
            faults.add(where, "type noise (random pictures) is not supported: give pictures")
            table.clear()
            table.update({"type": "local", "path": "."})
            continue
        table.setdefault("type", "local")
        rename(table, "dataset")
        drop_unused(table, "data", where, notes)
        path = str(table.get("path"))
        if path.startswith("hf://"):
            owner = "/".join(path.removeprefix("hf://").removeprefix("datasets/").split("/")[:2])
            text = f"`hf download {owner} --repo-type dataset --local-dir DIR`, then its path in DIR"
            faults.add(where, f"shards of the Hub are not streamed: {text} for {path}")
        elif path.startswith("pipe:"):
            faults.add(where, f"{path}: shards of a command are not read: give files")


# --- output ---


def _output(tables: Table, name: str, faults: Faults, notes: Notes) -> None:
    output = tables[name]
    if output.get("generate_diagrams") is True:  # as it is anyway
        del output["generate_diagrams"]
    drop_unused(output, name, name, notes)
    rename(output, name)
    if output.pop("no_samples", False):
        output["samples_per_checkpoint"] = 0
    misspelt(output, name, [*UNUSED[name], *RENAMED[name], "no_samples"], field_names(Output), faults)


# --- steps ---


def _steps(tables: Table, faults: Faults, notes: Notes, is_fluxflow: bool) -> None:
    training = tables.get("training")
    if not isinstance(training, dict):
        return
    pipeline = training.get("pipeline")
    pipeline = pipeline if isinstance(pipeline, dict) else {}
    defaults = pipeline.get("defaults")
    defaults = defaults if isinstance(defaults, dict) else {}
    listed = pipeline.get("steps")
    steps = [step for step in listed if isinstance(step, dict)] if isinstance(listed, list) else []
    _step(training, "training", faults, notes)
    _step(defaults, "training.pipeline.defaults", faults, notes)
    for step in steps:
        _step(step, f'step "{step.get("name")}"', faults, notes)
        _of_dataset(step, tables)
    if not is_fluxflow:
        return
    for step in steps or [training]:  # its text encoder is trained with the flow unless it is frozen
        whole = {**training, **defaults, **step}
        if whole.get("train_diff") and "text_encoder" not in (whole.get("freeze") or ()):
            step.setdefault("train_text_encoders", True)


def _drop_loading(tables: Table) -> None:
    """The steps have taken what a data set says of its batches."""
    datasets = tables.get("datasets")
    for table in datasets.values() if isinstance(datasets, dict) else ():
        for key in LOADING if isinstance(table, dict) else ():
            table.pop(key, None)


def _of_dataset(step: Table, tables: Table) -> None:
    """A data set's batch size and workers go before the defaults, and after those of the step."""
    datasets = tables.get("datasets")
    name = step.get("dataset") or tables.get("default_dataset")
    table = datasets.get(name) if isinstance(datasets, dict) else None
    for key in LOADING:
        if isinstance(table, dict) and table.get(key) is not None:
            step.setdefault(key, table[key])


def _step(table: Table, where: str, faults: Faults, notes: Notes) -> None:
    """Translates the keys of a step, wherever they stand, in place."""
    rename(table, "step")
    drop_unused(table, "step", where, notes)
    _freeze(table, where, notes)
    if table.pop("train_reconstruction", True) is False and table.get("gan_training"):
        table["train_vae"] = False
    for name in ("stop_condition", "transition_criteria"):
        if isinstance(given := table.pop(name, None), dict):
            rename(given, name)
            table.setdefault("transition_on", {"mode": "loss_threshold", **given})
    if isinstance(transition := table.get("transition_on"), dict):
        drop_unused(transition, "transition", f"{where}.transition_on", notes)
        if isinstance(metric := transition.get("metric"), str):
            transition["metric"] = METRICS.get(metric, metric)
    optimization(table, where, faults, notes)
    theirs = [*RENAMED["step"], *UNUSED["step"], *STEP_TABLES, *FROZEN]
    misspelt(table, where, theirs, [*field_names(Step), *field_names(Training), "pipeline"], faults)


def _freeze(table: Table, where: str, notes: Notes) -> None:
    """Names of components, lists of them and switches -> our lists."""
    switched = [part for switch, part in FROZEN.items() if table.pop(switch, False)]
    modules = table.pop("freeze_modules", None)
    if isinstance(modules, dict):
        switched += [name for name, is_frozen in modules.items() if is_frozen]
    if switched:
        table["freeze"] = [*(table.get("freeze") or ()), *switched]
    for key in ("freeze", "unfreeze"):
        if not isinstance(table.get(key), list):
            continue
        found = []
        for name in table[key]:
            if name in UNFREEZABLE:
                notes.add(UNFREEZABLE[name], f"{where}.{key}: {name}")
            else:
                found.append(COMPONENTS.get(name, name) if isinstance(name, str) else name)
        table[key] = list(dict.fromkeys(found))
