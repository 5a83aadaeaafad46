"""States of a training on disk, from which a killed run goes on as if it had not been."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux.errors import FluxError

STATE = "state.safetensors"
PROGRESS = "progress.json"


class States:
    """Folders, each complete or not there at all: they are written under another name and then renamed.

    A state is a file of arrays and a JSON object. Names sort by how far a run had come.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep

    def latest(self) -> Path | None:
        """The state that has come farthest."""
        return max(self._complete(), default=None)

    def save(self, name: str, table: dict[str, Any], save_arrays: Callable[[Path], None]) -> None:
        """Writes one, and removes the oldest; `save_arrays(file)` writes the arrays.

        FluxError where the disk refuses; the states that there were stay.
        """
        partial = self._folder / ".partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_arrays(partial / STATE)
            with (partial / PROGRESS).open("w", encoding="utf-8") as file:
                json.dump(table, file)
                file.flush()
                os.fsync(file.fileno())
            target = self._folder / name
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise FluxError(f"{self._folder / name}: the state cannot be written: {reason}") from None
        kept = sorted(self._complete())[-self._keep :]
        for other in self._folder.iterdir():  # also one whose removal a kill has cut short
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The JSON object of a state."""
        return json.loads((path / PROGRESS).read_text(encoding="utf-8"))

    def _complete(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if path.name[0] != "."]
        return [path for path in found if (path / STATE).is_file() and (path / PROGRESS).is_file()]
