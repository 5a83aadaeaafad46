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
from flux.models.florence2.vision import VisionTower
from flux.recipes.captioner import recipe
from flux.recipes.emoji import (
    COLOURS,
    SIDE,
    SIZES,
    Composition,
    Renderer,
    corners,
    draw_composition,
    subjects,
)
from flux.recipes.tiny.judge import reconstruct

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

        def make() -> np.ndarray:
            return reconstruct(autoencoder, np.stack([render(c) for c in self.compositions]))

        self.pictures = kept(folder / f"pool-{count}.npy", make)  # (count, 64, 64, 3) uint8


def kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the file; made and put there where it is absent."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"partial-{os.getpid()}.npy")
        np.save(partial, make())
        partial.replace(file)
    return np.load(file)


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


class Pictures:
    """What is trained on: as many pictures, most of them damaged, and what they show."""

    def __init__(self, count: int, seed: int, folder: Path, pool: Pool | None = None):
        """The pictures are kept in the folder. pool: where a share of them comes from."""
        rng, render = np.random.default_rng(seed), Renderer()
        self.names = list(subjects())[: recipe.SUBJECTS]
        drawn = [draw_composition(rng, self.names) for _ in range(count)]
        rows: list[int | None] = [None] * count  # of the pool
        if pool is not None:
            rows = [
                int(rng.integers(len(pool.pictures))) if rng.random() < POOL_SHARE else None for _ in drawn
            ]
            drawn = [c if i is None else pool.compositions[i] for c, i in zip(drawn, rows, strict=True)]
        self.compositions = drawn

        def make() -> np.ndarray:
            pairs = zip(drawn, rows, strict=True)
            pictures = ((c, render(c) if pool is None or i is None else pool.pictures[i]) for c, i in pairs)
            return np.stack([augment(picture, COLOURS[c.colour], rng) for c, picture in pictures])

        self.pixels = kept(folder / f"pictures-{seed}-{count}.npy", make)  # (count, 64, 64, 3) uint8

    def batches(self, count: int, seed: int) -> Callable[[int], dict[str, mx.array]]:
        """step -> pictures (B, 64, 64, 3) uint8; places as in `places`, (B, h, w, S + 1)."""
        index = {name: i for i, name in enumerate(self.names)}

        def batch(step: int) -> dict[str, mx.array]:
            rows = np.random.default_rng((seed, step)).integers(len(self.pixels), size=count)
            shares = np.stack([places(self.compositions[row], index) for row in rows])
            return {"pictures": mx.array(self.pixels[rows]), "places": mx.array(shares)}

        return batch


def features(tower: VisionTower, pictures: np.ndarray) -> np.ndarray:
    """What a trained vision tower sees in pictures (P, 64, 64, 3) uint8: (P, h, w, C)."""
    starts = range(0, len(pictures), 64)
    return np.concatenate([np.array(tower(normalised(mx.array(pictures[i : i + 64])))) for i in starts])


def captioned(
    shown: np.ndarray, compositions: list[Composition], tokenizer: BartTokenizer, count: int, seed: int
) -> Callable[[int], dict[str, mx.array]]:
    """step -> rows of `shown`, pictures or features, with captions of their compositions.

    shown (B, ...); prompts (B, P) and their mask; answers (B, L), padded.
    """
    prompts, mask = tokenizer([TASKS[task].ask() for task in recipe.CAPTION_TASKS])  # (3, P)
    ids_of = cache(lambda word: tokenizer.encode(word)[1:-1])  # a caption is its words one by one
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def batch(step: int) -> dict[str, mx.array]:
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(len(shown), size=count)
        tasks = rng.choice(len(recipe.CAPTION_TASKS), count, p=recipe.TASK_SHARES)
        answers = np.full((count, recipe.ANSWER_LENGTH), tokenizer.pad_token_id, np.int32)
        for answer, row, task in zip(answers, rows, tasks, strict=True):
            words = tokenizer.WORDS.findall(recipe.answers(compositions[row])[task])
            ids = [bos, *(i for word in words for i in ids_of(word)), eos]
            answer[: len(ids)] = ids
        chosen = mx.array(tasks)
        return {
            "shown": mx.array(shown[rows]),
            "prompts": prompts[chosen],
            "mask": mask[chosen],
            "answers": mx.array(answers),
        }

    return batch


def normalised(pictures: mx.array) -> mx.array:
    """(B, H, W, 3) uint8 -> float32, as the captioner's network gets them."""
    pixels = pictures.astype(mx.float32) / 255
    return (pixels - mx.array(recipe.PICTURES.mean)) / mx.array(recipe.PICTURES.deviation)
