"""States of a training on disk, from which a killed run goes on as if it had not been."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flux import jsonfiles
from flux.errors import FluxError
from flux.outputs import flush
from flux.weights import tensors

Value = TypeVar("Value")

STATE = "state.safetensors"
PROGRESS = "progress.json"
CHECKSUMS = "checksums"  # the key of the JSON object; states of earlier versions have none
NAME = re.compile(r"\d+(-\d+)?")  # any other folder belongs to someone else
CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class State(Generic[Value]):
    """A state that was found whole. damaged: what is wrong with those that have come farther, a line each."""

    path: Path
    value: Value
    damaged: tuple[str, ...] = ()


class States:
    """Folders, each complete or absent: they are written under another name and then renamed.

    A state is a file of arrays and a JSON object, with checksums of both. Names sort by
    how far a run has come.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep

    def latest(self) -> Path | None:
        """The state that has come farthest, whether it is damaged or not."""
        return max(self._complete(), default=None)

    def newest_whole(self, parse: Callable[[dict[str, Any]], Value]) -> State[Value] | None:
        """The state to go on from: that which has come farthest among those without damage.

        parse: of the JSON object; FluxError, TypeError, KeyError and the like mean that it is damaged, too.
        None where there is no state. FluxError, with all their faults, where every one is damaged.
        """
        damaged: list[str] = []
        for path in sorted(self._folders(), reverse=True):
            try:
                return State(path, _checked(path, parse), tuple(damaged))
            except FluxError as error:
                damaged.append(str(error))
        if damaged:
            raise FluxError(f"every state is damaged: {'; '.join(damaged)}")
        return None

    def save(self, name: str, table: dict[str, Any], save_arrays: Callable[[Path], None]) -> None:
        """Writes one, and removes the oldest; `save_arrays(file)` writes the arrays.

        States that had come farther are removed, too: whoever writes an earlier one has found them damaged.
        FluxError where the disk refuses; the states that there were stay.
        """
        partial, replaced = self._folder / ".partial", self._folder / ".replaced"
        target = self._folder / name
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_arrays(partial / STATE)
            checksums = {"arrays": _file_checksum(partial / STATE), "table": _table_checksum(table)}
            with (partial / PROGRESS).open("w", encoding="utf-8") as file:
                json.dump({**table, CHECKSUMS: checksums}, file)
            for path in (partial / PROGRESS, partial):
                flush(path)
            if target.exists():  # never half of it: a kill while it is removed leaves the state before
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(target, replaced)
            os.rename(partial, target)
            flush(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise FluxError(f"{target}: the state cannot be written: {reason}") from None
        kept = sorted(path for path in self._complete() if path.name <= name)[-self._keep :]
        for other in self._folders():  # also one whose removal a kill has cut short
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return [path for path in self._folder.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]

    def _complete(self) -> list[Path]:
        return [p for p in self._folders() if (p / STATE).is_file() and (p / PROGRESS).is_file()]


def _checked(path: Path, parse: Callable[[dict[str, Any]], Value]) -> Value:
    """A state's JSON object, parsed. FluxError, naming the state, for any damage to it or to the arrays."""
    try:
        text = jsonfiles.read_bytes(path / PROGRESS, jsonfiles.MAX_BYTES)
        table = jsonfiles.parse_object(text, infinite=True)  # as the best loss is at first
        checksums = table.pop(CHECKSUMS, None)
        if checksums is not None and checksums["table"] != _table_checksum(table):
            raise FluxError(f"{PROGRESS} is not what was written: its checksum differs")
        tensors.read_header(path / STATE)
        if checksums is not None and checksums["arrays"] != _file_checksum(path / STATE):
            raise FluxError(f"{STATE} is not what was written: its checksum differs")
        return parse(table)
    except FluxError as error:
        raise FluxError(f"{path} is damaged: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FluxError(f"{path} is damaged: {PROGRESS} cannot be understood: {error}") from None


def _file_checksum(path: Path) -> str:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def _table_checksum(table: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(table, sort_keys=True).encode()):08x}"


def load_state(model: nn.Module, file: Path, tree: str = "model") -> None:
    """Loads a trainer's state into a model: the parameters ("model") or their average ("ema.average")."""
    prefix = f"{tree}."
    arrays = tensors.load([file])
    model.update(
        tree_unflatten([(n.removeprefix(prefix), a) for n, a in arrays.items() if n.startswith(prefix)])
    )
    mx.eval(model.parameters())
