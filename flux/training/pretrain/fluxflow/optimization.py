"""FluxFlow's tables of optimizers and schedulers, in our keys."""

from pathlib import Path

from flux.tables import Faults, field_names, read_file
from flux.training.optimizers import CONFIGURED
from flux.training.pretrain.fluxflow.names import GROUPS, METRICS, Notes, Table


def optimization(table: Table, where: str, faults: Faults, notes: Notes) -> None:
    """Both kinds of tables, also from a file of their own, under `optimization`."""
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
            if isinstance(chosen, str):
                chosen = {"type": chosen}
            if isinstance(chosen, dict):
                place = f"{where}.optimization.{kind}.{name}"
                given[kind][name] = change(dict(chosen), place, faults, notes)


OPTIMIZER_KEYS = {  # of any of its optimizers -> values that change nothing
    "betas": (),
    "momentum": (0,),
    "weight_decay": (0,),
    "eps": (1e-8, "1e-8"),
    "alpha": (),
    "centered": (False,),
    "amsgrad": (False,),
    "decoupled_weight_decay": (True,),
    "dampening": (0,),
    "nesterov": (False,),
}


def _optimizer(table: Table, where: str, faults: Faults, notes: Notes) -> Table:
    table.setdefault("type", table.pop("optimizer_type", "AdamW"))
    kind = {name.lower(): cls for name, cls in CONFIGURED.items()}.get(str(table["type"]).lower())
    for name in [name for name in table if kind and name in OPTIMIZER_KEYS and name not in field_names(kind)]:
        value = table.pop(name)
        if value is not None and value not in OPTIMIZER_KEYS[name]:
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
