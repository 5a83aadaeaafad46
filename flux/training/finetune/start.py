"""What a fine-tuning begins with: new options, or a state in a run's folder."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.finetune.options import Options
from flux.training.states import State, States


@dataclass(frozen=True)
class Start:
    """A run that can be trained: the same on every rank.

    state: the folder on rank 0 that it goes on from, None for a new run. digest: of the data set that
    the state was trained on.
    """

    options: Options
    ranks: Ranks
    state: Path | None = None
    digest: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.options.output_dir).expanduser()


def begin(options: Options, ranks: Ranks | None = None) -> Start:
    """A new run. On several ranks rank 0's options hold. FluxError where its folder holds a run."""
    ranks = ranks or Ranks()
    return Start(Options.from_table(ranks.broadcast_result(lambda: _new(options).as_table())), ranks)


def resume(folder: str | Path, changes: dict[str, Any], ranks: Ranks | None = None) -> Start:
    """Goes on from the newest whole state in a run's folder; changes: options that were given anew.

    Damaged states that had come farther are named in a warning. The number of ranks may be another one: see
    `Options.shared_out`. FluxError where there is no state, and for options that would make it another run.
    """
    ranks = ranks or Ranks()
    state, digest, table = ranks.broadcast_result(lambda: _stored(Path(folder), changes, ranks.size))
    return Start(Options.from_table(table), ranks, Path(state), digest)


@dataclass(frozen=True)
class _Stored:
    """The JSON object of a state."""

    options: Options
    digest: str
    ranks: int

    @classmethod
    def parse(cls, table: dict[str, Any]) -> "_Stored":
        """KeyError, TypeError or FluxError for a table that is not one of a state."""
        return cls(Options.from_table(table["options"]), table["digest"], table.get("ranks", 1))


def _new(options: Options) -> Options:
    found = States(Path(options.output_dir).expanduser() / "states", options.keep_states).latest()
    if found:
        raise FluxError(
            f"{options.output_dir} holds a run ({found.name} batches): go on with --resume "
            f"{options.output_dir}, or give another --output-dir"
        )
    return options.resolved()


def _stored(folder: Path, changes: dict[str, Any], ranks: int) -> tuple[str, str, dict[str, Any]]:
    """The path of the state, its digest, and the options to go on with, as a table."""
    state: State[_Stored] | None = States(folder.expanduser() / "states", 1).newest_whole(_Stored.parse)
    if state is None:
        raise FluxError(f"{folder}: no state of a run to go on from: start it again without --resume")
    for damage in state.damaged:
        warnings.warn(f"{damage}: going on from {state.path}", stacklevel=2)
    options = replace(state.value.options, output_dir=str(folder)).shared_out(state.value.ranks, ranks)
    changes = {name: value for name, value in changes.items() if name != "output_dir"}
    return str(state.path), state.value.digest, options.changed(changes).as_table()
