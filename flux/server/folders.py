"""The server's folders, and the names that lead into them: never out of them."""

import re
from dataclasses import dataclass
from pathlib import Path

from flux.server.problems import Problem, absent, wrong

NAME = r"^[A-Za-z0-9]([A-Za-z0-9 ._-]{0,98}[A-Za-z0-9_-])?$"  # of datasets, runs and jobs
# Of files in models/ and outputs/, and of repositories: no part begins with a dot.
PATH = r"^[A-Za-z0-9_][A-Za-z0-9 ._:@+-]*(/[A-Za-z0-9_][A-Za-z0-9 ._:@+-]*)*$"
PARTS = ("datasets", "outputs", "models", "logs")
LONGEST, LONGEST_PART = (
    500,
    240,
)  # bytes of a path under a folder, and of a name in it


@dataclass(frozen=True)
class Folders:
    """`root` holds datasets/NAME/, datasets/NAME.toml, outputs/NAME/, models/ and logs/."""

    root: Path

    def make(self) -> None:
        """Make those that are not there."""
        for part in PARTS:
            (self.root / part).mkdir(parents=True, exist_ok=True)

    @property
    def datasets(self) -> Path:
        """Of pictures with their captions."""
        return self.root / "datasets"

    @property
    def outputs(self) -> Path:
        """Of trainings."""
        return self.root / "outputs"

    @property
    def models(self) -> Path:
        """What `pretrained_model` and the like are relative to."""
        return self.root / "models"

    @property
    def logs(self) -> Path:
        """What the programs print, and the queue of jobs."""
        return self.root / "logs"

    def dataset(self, name: str) -> Path:
        """The folder of a dataset, there or not."""
        return inside(self.datasets, checked(name))

    def config(self, name: str) -> Path:
        """The data.toml of a dataset, there or not."""
        return inside(self.datasets, f"{checked(name)}.toml")

    def output(self, name: str) -> Path:
        """The folder of a training, there or not."""
        return inside(self.outputs, checked(name))

    def log(self, job: str) -> Path:
        """What the program of a job prints."""
        return self.logs / f"{checked(job)}.log"


def checked(name: str) -> str:
    """The name, which is one for a file or folder. Problem otherwise."""
    if not re.fullmatch(NAME, name) or name.lower().endswith(".toml"):
        raise wrong(
            f"{name[:40]!a} is not a name: up to 100 letters, digits, spaces, '.', '_' and '-', beginning "
            f"with a letter or a digit, and not ending with .toml"
        )
    return name


def inside(folder: Path, relative: str) -> Path:
    """The path of a file under a folder, there or not. Problem where it leads elsewhere, also by a link."""
    parts = relative.replace("\\", "/").split("/")
    if not relative.isprintable() or Path(relative).is_absolute() or any(p in ("", ".", "..") for p in parts):
        raise wrong(f"{relative[:80]!a} is not a path under {folder.name}/")
    if len(relative.encode()) > LONGEST or any(len(part.encode()) > LONGEST_PART for part in parts):
        raise wrong(f"{relative[:80]!a}... is too long for a path")
    path = folder.joinpath(*parts)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links
        is_inside = False
    if not is_inside:
        raise wrong(f"{relative[:80]!a} leads out of {folder.name}/")
    return path


def listed(folder: Path, relative: str, what: str) -> Path:
    """The path of a file that a client asks for, under a folder. Problem 404 where there is none."""
    try:
        return existing(inside(folder, relative), what)
    except Problem:
        raise absent(f"there is no {what}") from None


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones and links."""
    found = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(path.name for path in found if path.name[0] != ".")


def existing(path: Path, what: str) -> Path:
    """The path. Problem 404 where it is not there."""
    try:
        if path.exists():
            return path
    except OSError:
        pass
    raise absent(f"there is no {what}")
