"""What a fine-tuning begins with: new options, or a state in a run's folder."""

import os
import warnings
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.outputs import LOCK
from flux.training.finetune import option_files
from flux.training.finetune.options import Options
from flux.training.states import State, States

CACHE = "cache"
EVENTS = "events.jsonl"


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
    """A new run. On several ranks rank 0's options hold.

    FluxError where its folder holds a run that is not finished. A finished one is moved by `make_folder`.
    """
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
    is_done: bool

    @classmethod
    def parse(cls, table: dict[str, Any]) -> "_Stored":
        """KeyError, TypeError or FluxError for a table that is not one of a state."""
        options = Options.from_table(table["options"])
        return cls(options, table["digest"], table.get("ranks", 1), table.get("is_done", False))


def make_folder(start: Start) -> Path | None:
    """Makes a run's folder, with its options in it.

    A finished run that was in it is moved to the first free name of FOLDER.1, FOLDER.2 ...; its new folder is
    returned. Its cache stays, as the pictures are often the same.
    """
    folder, kept = start.folder, None
    try:
        if start.state is None and _is_finished(folder):
            names = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
            kept = next(path for path in names if not path.exists())
            os.rename(folder, kept)
            folder.mkdir()
            for name in (CACHE, LOCK):  # the lock goes on: it is this run's
                if (kept / name).exists():
                    os.rename(kept / name, folder / name)
    except OSError as error:
        raise FluxError(f"{folder}: the finished run cannot be moved: {error.strerror}") from None
    option_files.save(start.options)
    return kept


def _is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that has come to its end and written its adapter."""
    states = States(folder / "states", 1)
    if states.latest() is None:  # they may have been removed for their size
        return (folder / EVENTS).is_file() and any(folder.glob("*.safetensors"))
    try:
        newest = states.newest_whole(_Stored.parse)
    except FluxError:  # all are damaged
        return False
    return newest is not None and newest.value.is_done and (folder / newest.value.options.file).is_file()


def _new(options: Options) -> Options:
    folder = Path(options.output_dir).expanduser()
    found = States(folder / "states", options.keep_states).latest()
    if _is_finished(folder):
        _check_moving(options, folder)
    elif found:
        raise FluxError(
            f"{options.output_dir} holds a run ({found.name} batches): go on with --resume "
            f"{options.output_dir}, or give another --output-dir"
        )
    return options.resolved()


def _check_moving(options: Options, folder: Path) -> None:
    """FluxError where a finished run's folder holds what the new one needs."""
    files = (options.data, options.model, *options.files.values(), *(file for file, _ in options.adapters))
    for file in (*files, os.curdir):
        path = Path(file).expanduser()
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            name = "the working folder" if file == os.curdir else file
            raise FluxError(
                f"{name} is in {folder}, the folder of a finished run, which would be moved: give another "
                f"--output-dir"
            )


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
