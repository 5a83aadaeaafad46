"""FluxFlow's tables of optimizers and schedulers, in our keys."""

from pathlib import Path
from typing import Any

from flux.tables import Faults, read_file
from flux.training.pretrain.fluxflow.names import GROUPS, METRICS, Notes, Table


def optimization(table: Table, where: str, faults: Faults, notes: Notes) -> None:
    """Both kinds of tables, also from another file, under `optimization`."""
    given: Table = {}
    if isinstance(file := table.pop("optim_sched_config", None), str):
        given |= read_file(Path(file).expanduser())
    given |= {kind: table.pop(kind) for kind in ("optimizers", "schedulers") if kind in table}
    if isinstance(table.get("optimization"), dict):
        given |= table["optimization"]
    if not given:
        return
    table["optimization"] = given
    for kind, change in (("optimizers", _optimizer), ("schedulers", _scheduler)):
        if not isinstance(given.get(kind), dict):
            continue
        for name in [name for name in given[kind] if name in GROUPS]:
            given[kind][GROUPS[name]] = given[kind].pop(name)
        for name, chosen in given[kind].items():
            each = {"type": chosen} if isinstance(chosen, str) else chosen
            if isinstance(each, dict):
                key = f"{where}.optimization.{kind}.{name}"
                made = change(dict(each), key, faults, notes)
                given[kind][name] = chosen if made == each else made


UNSUPPORTED: dict[str, dict[str, Any]] = {  # settings that MLX's optimizers lack, with what changes nothing
    "adamw": {"amsgrad": False},
    "adam": {"weight_decay": 0, "amsgrad": False},
    "rmsprop": {"weight_decay": 0, "momentum": 0, "centered": False},
    "lion": {"decoupled_weight_decay": True},
}


def _optimizer(table: Table, where: str, faults: Faults, notes: Notes) -> Table:
    table.setdefault("type", table.pop("optimizer_type", "AdamW"))
    for name, harmless in UNSUPPORTED.get(str(table["type"]).lower(), {}).items():
        if table.pop(name, harmless) not in (harmless, None):
            notes.add(f"MLX's {table['type']} has no such setting", f"{where}.{name}")
    return table


# Its types -> ours, with the names of keys and the values that those have where they are not given.
SCHEDULERS: dict[str, tuple[str, dict[str, str], Table]] = {
    "cosineannealing": ("cosine", {"eta_min_factor": "min_factor"}, {"min_factor": 0.1}),
    "step": ("step", {}, {"gamma": 0.1}),
    "exponential": ("exponential", {}, {"gamma": 0.95}),
    "reducelronplateau": ("reduce_on_plateau", {"factor": "gamma"}, {"gamma": 0.1, "threshold": 1e-4}),
    "linear": ("linear", {"total_iters": "steps"}, {"end_factor": 0.1}),
    "constant": ("held", {"factor": "start_factor", "total_iters": "steps"}, {}),
}


def _scheduler(table: Table, where: str, faults: Faults, notes: Notes) -> Table:
    given = str(table.setdefault("type", table.pop("scheduler_type", "CosineAnnealingLR"))).lower()
    name = given.removesuffix("lr")
    if name not in SCHEDULERS or (name == given and name in ("step", "exponential", "linear", "constant")):
        return table  # one of ours, or none
    kind, renamed, defaults = SCHEDULERS[name]
    del table["type"]
    if table.pop("T_max", None) is not None:
        notes.add("a cosine falls over the whole step", f"{where}.T_max")
    if kind == "reduce_on_plateau" and table.pop("mode", "min") != "min":
        faults.add(f"{where}.mode", "must be min: the metrics are losses")
    found = {renamed.get(key, key): value for key, value in table.items()}
    if isinstance(found.get("metric"), str):
        found["metric"] = METRICS.get(found["metric"], found["metric"])
    return {"type": kind, **defaults, **found}
