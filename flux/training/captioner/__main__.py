"""Trains the built-in captioner.

    python -m flux.training.captioner --run DIR --steps N
    mlx.launch -n 2 --backend ring -- python -m flux.training.captioner ...

Stopped at any moment it goes on from the last state in DIR.
"""

import argparse
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from flux.captioning.tokenizer import BartTokenizer
from flux.distributed import average_gradients
from flux.errors import FluxError
from flux.models.florence2 import Florence2, Florence2Params
from flux.pipeline import FluxPipeline
from flux.training.captioner import recipe
from flux.training.captioner.pictures import Pool, batches
from flux.training.convolution import use_products
from flux.training.optimizers import muon, warmup_decay
from flux.training.pretrain.callbacks import Log, Save
from flux.training.trainer import Trainer

STATE = "captioner.safetensors"


class Pupil(nn.Module):
    """The captioner, and a probe that says from the vision tower's features which subject is where.

    Through the probe's loss the tower learns subjects before the language model has learned to look at it:
    captions alone leave it with one hint a picture, the subject's name, among a dozen words that are easier.
    The probe is not part of what is exported.
    """

    def __init__(self, params: Florence2Params):
        super().__init__()
        self.captioner = Florence2(params)
        width = params.vision.embed_dim[-1]
        self.probe_norm = nn.LayerNorm(width)
        self.probe = nn.Linear(width, recipe.SUBJECTS + 1)
        # As large as the features that they are added to: else places are learned late.
        positions = self.captioner.multi_modal_projector.image_position_embed
        for table in (positions.row_embeddings, positions.column_embeddings):
            table.weight = mx.random.normal(table.weight.shape)


def pupil_loss(
    model: Pupil, batch: dict[str, mx.array], key: mx.array, pad: int
) -> tuple[mx.array, dict[str, mx.array]]:
    """The sum of the captioner's loss and the probe's.

    Metrics: both losses; the share of tokens whose most likely prediction is right.
    """
    pixels = batch["pictures"].astype(mx.float32) / 255
    pixels = (pixels - mx.array(recipe.PICTURES.mean)) / mx.array(recipe.PICTURES.deviation)
    features = model.captioner.vision_tower(pixels)  # (B, h, w, C)
    caption, right = caption_loss(model.captioner, features, batch, pad)
    named = model.probe(model.probe_norm(features))  # (B, h, w, S + 1)
    probe = nn.losses.cross_entropy(named, batch["places"]).mean()
    return caption + probe, {"caption": caption, "probe": probe, "right": right}


def caption_loss(
    model: Florence2, features: mx.array, batch: dict[str, mx.array], pad: int
) -> tuple[mx.array, mx.array]:
    """Mean cross entropy of the answers' tokens, each predicted from those before it, and how many are right.

    features (B, h, w, C): of the vision tower. The second is the share whose most likely prediction is right.
    """
    answers = batch["answers"]
    start = mx.full((len(answers), 1), recipe.GENERATION.decoder_start_token_id, answers.dtype)
    shifted = mx.concatenate([start, answers[:, :-1]], axis=1)
    image = model.multi_modal_projector(features)
    logits = model.scores(*model.read(image, batch["prompts"], batch["mask"]), shifted)  # (B, L, vocabulary)
    counts = answers != pad
    total = counts.sum()
    loss = (nn.losses.cross_entropy(logits, answers) * counts).sum() / total
    return loss, ((logits.argmax(axis=-1) == answers) * counts).sum() / total


def is_edge(name: str, parameter: mx.array) -> bool:
    """What Muon is no good for: embeddings, the layers at pixels and at names, depthwise convolutions."""
    edges = ("probe", "shared", "embed_positions", "position_embed", "convs.0", "conv1", "conv2")
    return any(edge in name for edge in edges)


def make_trainer(
    tokenizer: BartTokenizer, batch: int, steps: int, rate: float, seed: int, pool: Pool | None
) -> Trainer:
    """The trainer for this process's share of the pictures."""
    group = mx.distributed.init()
    mx.random.seed(seed)
    model = Pupil(recipe.params(tokenizer))
    if mx.default_device().type == mx.cpu:
        use_products(model)
    warmup = min(20, steps)
    rates = (warmup_decay(peak, steps, warmup, 0.4) for peak in (rate, rate / 10))
    loss = partial(pupil_loss, pad=tokenizer.pad_token_id)
    return Trainer(
        model,
        loss,
        batches(tokenizer, batch, seed, group.rank(), pool),
        muon(*rates, is_edge),
        seed,
        average=average_gradients(group) if group.size() > 1 else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, log, vocabulary")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument(
        "--batch", type=int, default=64, help="pictures a step and process (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is a tenth")
    parser.add_argument("--pool", type=int, default=3000, help="pictures through the generator's autoencoder")
    parser.add_argument(
        "--generator", default="tiny", help="whose autoencoder that is (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = arguments.run
    try:
        tokenizer = recipe.load_tokenizer(run / "tokenizer")
        pool = None
        if arguments.pool:
            pool = Pool(FluxPipeline(arguments.generator).ae, arguments.pool, run)
        trainer = make_trainer(
            tokenizer, arguments.batch, arguments.steps, arguments.rate, arguments.seed, pool
        )
        if (run / STATE).exists():
            trainer.load(run / STATE)
    except FluxError as error:
        parser.exit(2, f"error: {error}\n")
    first = mx.distributed.init().rank() == 0
    trainer.run(arguments.steps, (Log(run / "captioner.jsonl", 50), Save(run / STATE)) if first else ())
    if first:
        trainer.save(run / STATE)


if __name__ == "__main__":
    main()
