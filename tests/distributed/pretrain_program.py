"""What each rank of the tests of pretraining runs: the configs named in a plan, and what became of them."""

import hashlib
import json
import sys
from pathlib import Path

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flux.training.pretrain.run import Run
from flux.training.pretrain.validate import load


class Stopped(Exception):
    pass


def execute(config: Path, stop: int | None = None, resume: bool = False, random: bool = True) -> Run:
    """A run; with `stop` it is lost after so many steps. random: else the losses' random numbers are 0."""

    def hook(stage, progress) -> None:
        if stop is not None and progress.global_step == stop:
            raise Stopped

    run = Run(load(config), resume, quiet=True, hook=hook)
    normal, uniform = mx.random.normal, mx.random.uniform
    if not random:  # only now: the networks have their first values
        mx.random.normal = lambda shape, key=None: mx.zeros(shape)
        mx.random.uniform = lambda low, high, shape, key=None: mx.full(shape, low)
    try:
        run.execute()
    except Stopped:
        pass
    finally:
        mx.random.normal, mx.random.uniform = normal, uniform
    return run


def digest(run: Run) -> str:
    total = hashlib.sha256()
    for _, array in sorted(tree_flatten(run.networks.parameters())):
        total.update(np.array(array).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {"straight": digest(execute(folder / "straight/config.json"))}
    execute(folder / "resumed/config.json", stop=5)
    found["resumed"] = digest(execute(folder / "resumed/config.json", resume=True))
    execute(folder / "shared/config.json", random=False)
    (folder / f"found{mx.distributed.init().rank()}.json").write_text(json.dumps(found))
