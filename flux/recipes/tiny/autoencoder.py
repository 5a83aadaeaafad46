"""Stage 1 of the built-in model: the autoencoder.

    python -m flux.recipes.tiny.autoencoder --run DIR --steps N
    mlx.launch -n 2 --backend ring -- python -m flux.recipes.tiny.autoencoder ...

Stopped at any moment it goes on from the last state in DIR.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from flux import images
from flux.arguments import described, run_program
from flux.distributed.gradients import average_gradients
from flux.distributed.ranks import Ranks
from flux.evaluation.likeness import psnr
from flux.models.autoencoder import AutoEncoder
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import (
    SIDE,
    SIZES,
    Composition,
    Renderer,
    compositions,
    corners,
    draw_composition,
    subjects,
)
from flux.recipes.tiny import recipe
from flux.training import losses
from flux.training.callbacks import logged_and_saved
from flux.training.matmul_convolution import use_products
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.trainer import Trainer

GRID = 8  # pixels, the stride of the latent
CROP = 32


def picture_batches(count: int, steps: int, seed: int, rank: int) -> Callable[[int], mx.array]:
    """step -> (count, 64, 64, 3) uint8 pictures, not held out, or (4 * count, 32, 32, 3) crops of such.

    Most of a picture is flat: crops show the network four times as many drawings in the same time. It sees
    whole pictures in a quarter of the steps, and alone at the end, since its norms and its attention go over
    all of a picture.
    """
    render, names = Renderer(), list(subjects())[: recipe.SUBJECTS]

    def batch(step: int) -> mx.array:
        rng = np.random.default_rng((seed, rank, step))
        whole = step % 4 == 3 or step >= recipe.CROPS_UNTIL * steps
        drawn = [draw_composition(rng, names) for _ in range(count if whole else 4 * count)]
        return mx.array(np.stack([render(c) if whole else crop(render(c), c, rng) for c in drawn]))

    return batch


def crop(picture: np.ndarray, composition: Composition, rng: np.random.Generator) -> np.ndarray:
    """A random (32, 32, 3) part of the picture, on the grid of the latent, that shows some of a subject."""
    places = corners(composition)
    x, y = places[rng.integers(len(places))]
    beyond = (SIZES[composition.size] - CROP) // GRID  # steps of the grid that the box has more than a crop
    x, y = (i + GRID * int(rng.integers(-1, max(beyond, 1) + 1)) for i in (x, y))
    x, y = (min(max(i, 0), SIDE - CROP) for i in (x, y))
    return picture[y : y + CROP, x : x + CROP]


def autoencoder_loss(
    model: AutoEncoder, pictures: mx.array, key: mx.array, mse_weight: float, kl_weight: float
):
    """L1 + MSE + KL of pictures (B, H, W, 3) uint8, decoded from a sample of the raw latent."""
    x = images.normalize(pictures)
    mean, logvar = model.moments(x)
    z = losses.posterior(mean, logvar, mx.random.normal(mean.shape, key=key))
    error, mse = losses.reconstruction(model.decoder(z), x, mse_weight)
    divergence = losses.kl(mean, logvar)
    return error + kl_weight * divergence, {"mse": mse, "kl": divergence}


def held_out_pictures(count: int, seed: int = 0) -> np.ndarray:
    """(count, 64, 64, 3) uint8: a fixed choice among the held-out compositions."""
    every = compositions(True, list(subjects())[: recipe.SUBJECTS])
    chosen = np.random.default_rng(seed).choice(len(every), min(count, len(every)), replace=False)
    render = Renderer()
    return np.stack([render(every[i]) for i in chosen])


def reconstruct(model: AutoEncoder, pictures: np.ndarray, batch: int = 32) -> np.ndarray:
    """(B, H, W, 3) uint8 through encoder and decoder, rounded to uint8 again."""
    decoded = []
    for start in range(0, len(pictures), batch):
        x = images.normalize(pictures[start : start + batch])
        decoded.append(images.to_uint8(images.denormalize(model.decoder(model.moments(x)[0]))))
    return np.concatenate(decoded)


def is_edge(name: str, parameter: mx.array) -> bool:
    """The layers at the pixels and at the latent: few numbers on one side, nothing to make orthogonal."""
    return "conv_in" in name or "conv_out" in name


def make_trainer(
    model: AutoEncoder, batch: int, steps: int, rate: float, seed: int, mse_weight: float
) -> Trainer:
    """The trainer of stage 1, for this process's share of the pictures."""
    group = mx.distributed.init()
    if mx.default_device().type == mx.cpu:
        use_products(model)
    warmup = min(100, steps)
    optimizer = muon(
        warmup_decay(rate, steps, warmup, 0.3), warmup_decay(rate / 8, steps, warmup, 0.3), is_edge
    )
    return Trainer(
        model,
        partial(autoencoder_loss, mse_weight=mse_weight, kl_weight=recipe.KL_WEIGHT),
        picture_batches(batch, steps, seed, group.rank()),
        optimizer,
        seed=2 * seed + group.rank(),
        average=average_gradients(group) if group.size() > 1 else None,
    )


def save_grid(model: AutoEncoder, file: Path, count: int = 24) -> float:
    """A PNG of held-out pictures above their reconstructions; returns the mean PSNR of 200 of them, dB."""
    pictures = held_out_pictures(200)
    decoded = reconstruct(model, pictures)
    rows = [
        np.concatenate(list(p[i : i + 12]), axis=1) for i in range(0, count, 12) for p in (pictures, decoded)
    ]
    Image.fromarray(np.concatenate(rows)).save(file)
    return float(psnr(pictures, decoded).mean())


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Train the autoencoder, or go on with it."""
    parser = described(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, log, pictures")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step and process")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is an eighth")
    parser.add_argument("--mse-weight", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", metavar="MODEL", help="begin with this model's autoencoder (default: random)"
    )
    arguments = parser.parse_args()
    mx.random.seed(arguments.seed)
    model = AutoEncoder(recipe.AUTOENCODER)
    trainer = make_trainer(
        model, arguments.batch, arguments.steps, arguments.rate, arguments.seed, arguments.mse_weight
    )
    if arguments.init:
        model.update(tree_map(lambda w: w.astype(mx.float32), FluxPipeline(arguments.init).ae.parameters()))
    state = arguments.run / "autoencoder.safetensors"
    if state.exists():
        trainer.load(state)
    first = mx.distributed.init().rank() == 0
    log = arguments.run / "autoencoder.jsonl"
    trainer.run(arguments.steps, logged_and_saved(log, state, recipe.LOG_STEPS) if first else ())
    if first:
        trainer.save(state)
        print("PSNR", save_grid(model, arguments.run / "autoencoder.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
