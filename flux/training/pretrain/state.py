"""How far a run has come, and its checkpoints: all that a killed run needs to go on as if it had not been."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flux.errors import FluxError
from flux.training.callbacks import Window
from flux.training.pretrain.config import Config
from flux.training.schedules import Plateau
from flux.training.states import STATE, State, States
from flux.trees import named_arrays
from flux.weights import tensors


@dataclass
class Progress:
    """What moves, besides the arrays in the trainer's file.

    index: of the pipeline's step; `begun`: the file of arrays is of this step, not of the one before.
    global_step: optimizer steps done in all. session: how often the run was started. scale, shift: of the
    latents; `measured` says that they fit the autoencoder as it is.
    """

    index: int = 0
    begun: bool = False
    global_step: int = 0
    session: int = 1
    scale: float = 1.0
    shift: float = 0.0
    measured: bool = False
    epoch: Window = field(default_factory=Window)
    window: Window = field(default_factory=Window)
    plateaus: dict[str, Plateau] = field(default_factory=dict)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> "Progress":
        """The inverse of `asdict`."""
        table = dict(table)
        for name in ("epoch", "window"):
            table[name] = Window(**table[name])
        table["plateaus"] = {group: Plateau(**plateau) for group, plateau in table["plateaus"].items()}
        return cls(**table)


class Checkpoints(States):
    """The states of a run, which only a run of the same config goes on from."""

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        super().__init__(folder, keep)
        self._identity = identity

    def save_progress(self, progress: Progress, save_arrays: Callable[[Path], None]) -> None:
        """Writes a state; `save_arrays(file)` writes the arrays."""
        name = f"{progress.global_step:09d}-{progress.index:03d}"
        self.save(name, {"identity": self._identity, "progress": asdict(progress)}, save_arrays)

    def newest(self) -> State[Progress] | None:
        """The state to go on from, if there is one. FluxError if it is of another config."""
        found = self.newest_whole(lambda table: (table["identity"], Progress.from_json(table["progress"])))
        if found is None:
            return None
        theirs, progress = found.value
        ours, theirs = (_begun(table, progress.index) for table in (self._identity, theirs))
        if other := [name for name, value in ours.items() if theirs.get(name) != value]:
            names = ", ".join(other)
            raise FluxError(
                f"{found.path} is of a run with another {names}: give the config that it was begun with"
            )
        return State(found.path, progress, found.damaged)


def _begun(identity: dict[str, Any], index: int) -> dict[str, Any]:
    """An identity without the steps after number `index`: they may still become others."""
    return {**identity, "steps": identity["steps"][: index + 1]}


def state_of(run: str) -> Path:
    """The arrays of the newest state of a run, by its folder or a file in it, which need not be there."""
    path = Path(run).expanduser()
    folder = path if path.is_dir() else path.parent
    found = States(folder / "checkpoints", 1).newest_whole(lambda table: table)
    if found is None:
        raise FluxError(f"{run}: no run with checkpoints in {folder}")
    return found.path / STATE


def begin_with(model: nn.Module, run: str) -> str:
    """Gives a network what has its name and shape in a run's newest state; a line that says how much.

    FluxError where that is nothing.
    """
    arrays = {name.removeprefix("model."): array for name, array in tensors.load([state_of(run)]).items()}
    ours = dict(named_arrays(model.parameters()))
    fitting = [(name, arrays[name]) for name, array in ours.items() if _fits(arrays.get(name), array)]
    if not fitting:
        raise FluxError(f"model_checkpoint: {run} has no networks of these sizes")
    model.update(tree_unflatten(fitting))
    others = sorted({name.split(".")[0] for name in ours.keys() - dict(fitting).keys()})
    rest = f"; random in part: {', '.join(others)}" if others else ""
    return f"began with {len(fitting)} of {len(ours)} tensors of {run}{rest}"


def _fits(found: mx.array | None, wanted: mx.array) -> bool:
    return found is not None and found.shape == wanted.shape


def identity(config: Config, processes: int) -> dict[str, Any]:
    """What must be the same when a run is resumed: all that its result depends on."""
    return {
        "model": repr(config.model),
        "data": repr(config.data),
        "datasets": repr(config.datasets),
        "default_dataset": config.default_dataset,
        "model_checkpoint": config.model_checkpoint,
        "seed": config.training.seed,
        "steps": [repr(step) for step in config.steps],
        "number of processes": processes,
    }
