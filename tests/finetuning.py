"""A miniature fine-tuning: a model of random weights, four pictures, an update in milliseconds."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux.training.finetune import Options, Result, Stop, begin, finetune, resume
from flux.training.report import read_lines

from . import tiny_pipeline
from .datasets import write_pictures

TIMES = ("seconds", "peak_memory")  # of a line of events: all that may differ between equal runs


def write_model(folder: Path) -> str:
    return str(tiny_pipeline.write_checkpoint(folder))


def write_data(folder: Path, count: int = 4) -> str:
    """Pictures with a caption each; the last has another shape."""
    names = {f"{i}.png": (80, 64) if i else (64, 64) for i in range(count)}
    write_pictures(folder, names)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"picture {i}, of an sks dog")
    return str(folder)


def options(model: str, data: str, folder: Path, **changes: Any) -> Options:
    small = {"resolution": (64, 64), "enable_bucket": True}
    small |= changes.pop("data_options", {})
    made = {"data": data, "model": model, "output_dir": str(folder), "data_options": small, "rank": 2}
    return Options(**(made | {"iterations": 6, "learning_rate": 1e-2, "state_every": 1} | changes))


def run(options: Options, stop: Stop | None = None) -> Result:
    return finetune(begin(options), quiet=True, stop=stop)


def go_on(folder: Path, **changes: Any) -> Result:
    return finetune(resume(folder, changes), quiet=True)


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock."""
    lines = list(read_lines(folder / "events.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def arrays(path: Path) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in mx.load(str(path)).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: the adapters, the events, the last states and the progress pictures."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert arrays(one / name) == arrays(other / name), name
    assert events(one) == events(other)
    last = max((one / "states").iterdir()).name
    assert arrays(one / "states" / last / "state.safetensors") == arrays(
        other / "states" / last / "state.safetensors"
    )
    for path in one.glob("progress/*.png"):
        assert path.read_bytes() == (other / "progress" / path.name).read_bytes()


def as_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "states" / name / "progress.json").read_text())
