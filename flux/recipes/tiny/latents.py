"""Between the stages: the latents of all training pictures, made once with the trained encoder.

Alone, or by several processes that share the pictures out:

    python -m flux.recipes.tiny.latents --run DIR
    mlx.launch -n 2 --backend ring -- python -m flux.recipes.tiny.latents ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux import images
from flux.arguments import described, run_program
from flux.distributed.ranks import Ranks
from flux.models.autoencoder import AutoEncoder
from flux.recipes.emoji import (
    PAIR,
    PAIR_SHARE,
    Composition,
    Renderer,
    compositions,
    draw_composition,
    subjects,
)
from flux.recipes.tiny import recipe
from flux.training.states import load_state
from flux.weights import tensors


@dataclass(frozen=True)
class Latents:
    """Training pictures: what they show and their latents.

    mean, logvar (P, 8, 8, 16) float32, raw; scale, shift: 1 / deviation and mean of all of `mean`.
    """

    compositions: list[Composition]
    mean: np.ndarray
    logvar: np.ndarray
    scale: float
    shift: float

    def scaled(self, rows: np.ndarray) -> np.ndarray:
        """The means of some pictures, with mean 0 and deviation 1 over all: what the flow learns to make."""
        return (self.mean[rows] - self.shift) * self.scale

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random rows, (count,): a pair with its share, else a single subject."""
        pairs = rng.random(count) < PAIR_SHARE
        singles = sum(c.place != PAIR for c in self.compositions)  # they come first
        return np.where(
            pairs, rng.integers(singles, len(self.compositions), count), rng.integers(singles, size=count)
        )


def training_compositions(pairs: int, seed: int = 0) -> list[Composition]:
    """All single subjects that are not held out, then `pairs` random pairs."""
    rng, names = np.random.default_rng(seed), list(subjects())[: recipe.SUBJECTS]
    chosen: list[Composition] = []
    while len(chosen) < pairs:
        composition = draw_composition(rng, names)
        if composition.place == PAIR:
            chosen.append(composition)
    return compositions(False, names) + chosen


def encode(model: AutoEncoder, chosen: list[Composition], batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Raw mean and log variance of each picture, (P, 8, 8, 16) each."""
    render, means, logvars = Renderer(), [], []
    for start in range(0, len(chosen), batch):
        pictures = np.stack([render(c) for c in chosen[start : start + batch]])
        mean, logvar = model.moments(images.normalize(pictures))
        means.append(np.array(mean))
        logvars.append(np.array(logvar))
    return np.concatenate(means), np.concatenate(logvars)


def encode_shared(model: AutoEncoder, chosen: list[Composition]) -> list[mx.array]:
    """`encode` by all processes, a part each."""
    group = mx.distributed.init()
    size = group.size()
    padded = chosen + chosen[: -len(chosen) % size]
    parts = encode(model, padded[group.rank() :: size])  # (P / size, 8, 8, 16)
    gathered = [mx.distributed.all_gather(mx.array(part)[None], group=group) for part in parts]
    mx.eval(gathered)  # by every process, also by those that do not use it
    return [part.swapaxes(0, 1).flatten(0, 1)[: len(chosen)] for part in gathered]


def read(file: Path) -> Latents:
    """The file of `main`."""
    arrays = tensors.load([file])
    mean, logvar = np.array(arrays["mean"]), np.array(arrays["logvar"])
    scale, shift = float(1 / mean.std()), float(mean.mean())
    return Latents(training_compositions(recipe.PAIRS), mean, logvar, scale, shift)


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Encode all training pictures and write the file."""
    parser = described(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with the trained autoencoder's state")
    run = parser.parse_args().run
    model = AutoEncoder(recipe.AUTOENCODER)
    load_state(model, run / "autoencoder.safetensors")
    mean, logvar = encode_shared(model, training_compositions(recipe.PAIRS))
    if mx.distributed.init().rank() == 0:
        mx.save_safetensors(str(run / "latents.safetensors"), {"mean": mean, "logvar": logvar})
    return 0


if __name__ == "__main__":
    sys.exit(main())
