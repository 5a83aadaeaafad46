"""What the captioner is shown: renderings, as they are and damaged as files and generated pictures are."""

import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter

from flux.captioning.tasks import TASKS
from flux.captioning.tokenizer import BartTokenizer
from flux.models.autoencoder import AutoEncoder
from flux.training.captioner import recipe
from flux.training.pretrain.autoencoder import reconstruct
from flux.training.pretrain.emoji import (
    COLOURS,
    SIDE,
    SIZES,
    Composition,
    Renderer,
    corners,
    draw_composition,
    subjects,
)

BICUBIC = Image.Resampling.BICUBIC
POOL_SHARE = 0.25  # of the pictures: reconstructed by the generator's autoencoder
SHIFT = 2.0  # pixels; the places of large subjects are 8 apart
ZOOM = 0.04


def augment(picture: np.ndarray, ground: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Moves, resizes, blurs, compresses and disturbs a picture (64, 64, 3) uint8, each at random.

    ground: the colour that comes in from beyond the edges.
    """
    image = Image.fromarray(picture)
    if rng.random() < 0.4:
        zoom = 1 + rng.uniform(-ZOOM, ZOOM)
        x, y = SIDE / 2 * (1 - zoom) + rng.uniform(-SHIFT, SHIFT, 2)
        matrix = (zoom, 0, x, 0, zoom, y)
        image = image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=ground
        )
    if rng.random() < 0.2:
        side = int(rng.integers(40, 160))
        image = image.resize((side, side), BICUBIC).resize((SIDE, SIDE), BICUBIC)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.2:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(50, 96)))
        image = Image.open(file)
    pixels = np.asarray(image, np.float32)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, 5, 3).astype(np.float32)  # each colour a little more or less
    if rng.random() < 0.3:
        pixels = pixels + rng.uniform(0, 10) * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


class Pool:
    """Pictures that the generator's autoencoder has reconstructed: its blur is that of generated pictures."""

    def __init__(self, autoencoder: AutoEncoder, count: int, folder: Path, seed: int = 0):
        """Kept in the folder, for a run that is resumed: they take half a minute a thousand."""
        rng, render = np.random.default_rng((seed, count)), Renderer()
        names = list(subjects())[: recipe.SUBJECTS]
        self.compositions = [draw_composition(rng, names) for _ in range(count)]
        file = folder / f"pool-{count}.npy"
        if not file.exists():
            pictures = reconstruct(autoencoder, np.stack([render(c) for c in self.compositions]))
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"partial-{os.getpid()}.npy"
            np.save(partial, pictures)
            partial.replace(file)
        self.pictures = np.load(file)  # (count, 64, 64, 3) uint8


def places(composition: Composition, index: dict[str, int]) -> np.ndarray:
    """(h, w, S + 1): the share of each place of the feature map that each subject's box has, and nothing has.

    index: a subject's number.
    """
    side, stride = SIZES[composition.size], recipe.STRIDE
    shares = np.zeros((SIDE // stride, SIDE // stride, len(index) + 1), np.float32)
    for name, (x, y) in zip(composition.subjects, corners(composition), strict=True):
        box = np.zeros((SIDE, SIDE), np.float32)
        box[y : y + side, x : x + side] = 1
        shares[:, :, index[name]] = box.reshape(SIDE // stride, stride, SIDE // stride, stride).mean((1, 3))
    shares[:, :, -1] = 1 - shares.sum(axis=2)
    return shares


def batches(
    tokenizer: BartTokenizer, count: int, seed: int, rank: int = 0, pool: Pool | None = None
) -> Callable[[int], dict[str, mx.array]]:
    """step -> a batch of `count` pictures, other ones on every rank.

    pictures (B, 64, 64, 3) uint8; prompts (B, P) and their mask; answers (B, L), padded; places as in
    `places`, (B, h, w, S + 1).
    """
    render, names = Renderer(), list(subjects())[: recipe.SUBJECTS]
    prompts, mask = tokenizer([TASKS[task].ask() for task in recipe.CAPTION_TASKS])  # (3, P)
    ids_of = cache(lambda word: tokenizer.encode(word)[1:-1])  # a caption is its words one by one
    index = {name: i for i, name in enumerate(names)}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def batch(step: int) -> dict[str, mx.array]:
        rng = np.random.default_rng((seed, rank, step))
        pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
        answers = np.full((count, recipe.ANSWER_LENGTH), tokenizer.pad_token_id, np.int32)
        shown = []
        tasks = rng.choice(len(recipe.CAPTION_TASKS), count, p=recipe.TASK_SHARES)
        for i, task in enumerate(tasks):
            if pool is not None and rng.random() < POOL_SHARE:
                j = rng.integers(len(pool.compositions))
                composition, picture = pool.compositions[j], pool.pictures[j]
            else:
                composition = draw_composition(rng, names)
                picture = render(composition)
            pictures[i] = augment(picture, COLOURS[composition.colour], rng)
            words = tokenizer.WORDS.findall(recipe.answers(composition)[task])
            ids = [bos, *(i for word in words for i in ids_of(word)), eos]
            answers[i, : len(ids)] = ids
            shown.append(places(composition, index))
        chosen = mx.array(tasks)
        return {
            "pictures": mx.array(pictures),
            "prompts": prompts[chosen],
            "mask": mask[chosen],
            "answers": mx.array(answers),
            "places": mx.array(np.stack(shown)),
        }

    return batch
