"""Trains the built-in captioner: python -m flux.training.captioner --run DIR --steps N.

Stopped at any moment it goes on from the last state in DIR.
"""

import argparse
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from flux.captioning.tokenizer import BartTokenizer
from flux.errors import FluxError
from flux.models.florence2 import Florence2
from flux.pipeline import FluxPipeline
from flux.training.captioner import recipe
from flux.training.captioner.pictures import Pool, batches
from flux.training.convolution import use_products
from flux.training.optimizers import muon, warmup_decay
from flux.training.pretrain.callbacks import Log, Save
from flux.training.trainer import Trainer

STATE = "captioner.safetensors"


def caption_loss(
    model: Florence2, batch: dict[str, mx.array], key: mx.array, pad: int
) -> tuple[mx.array, dict[str, mx.array]]:
    """Mean cross entropy of the answers' tokens, each predicted from those before it.

    Metrics: the share of tokens whose most likely prediction is right.
    """
    answers = batch["answers"]
    pixels = batch["pictures"].astype(mx.float32) / 255
    pixels = (pixels - mx.array(recipe.PICTURES.mean)) / mx.array(recipe.PICTURES.deviation)
    start = mx.full((len(answers), 1), recipe.GENERATION.decoder_start_token_id, answers.dtype)
    shifted = mx.concatenate([start, answers[:, :-1]], axis=1)
    logits = model(pixels, batch["prompts"], shifted, batch["mask"])  # (B, L, vocabulary)
    counts = answers != pad
    total = counts.sum()
    loss = (nn.losses.cross_entropy(logits, answers) * counts).sum() / total
    right = ((logits.argmax(axis=-1) == answers) * counts).sum() / total
    return loss, {"right": right}


def is_edge(name: str, parameter: mx.array) -> bool:
    """What Muon is no good for: embeddings, the layer at the pixels, and convolutions of single channels."""
    edges = ("shared", "embed_positions", "position_embed", "convs.0", "conv1", "conv2")
    return any(edge in name for edge in edges)


def make_trainer(
    tokenizer: BartTokenizer, batch: int, steps: int, rate: float, seed: int, pool: Pool | None
) -> Trainer:
    mx.random.seed(seed)
    model = Florence2(recipe.params(tokenizer))
    if mx.default_device().type == mx.cpu:
        use_products(model)
    warmup = min(50, steps)
    rates = (warmup_decay(peak, steps, warmup, 0.4) for peak in (rate, rate / 10))
    loss = partial(caption_loss, pad=tokenizer.pad_token_id)
    return Trainer(model, loss, batches(tokenizer, batch, seed, pool), muon(*rates, is_edge), seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, log, vocabulary")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64, help="pictures a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is a tenth")
    parser.add_argument("--pool", type=int, default=2000, help="pictures through the generator's autoencoder")
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
            pool = Pool(FluxPipeline(arguments.generator).ae, arguments.pool, run / "pool.npy")
        trainer = make_trainer(
            tokenizer, arguments.batch, arguments.steps, arguments.rate, arguments.seed, pool
        )
        if (run / STATE).exists():
            trainer.load(run / STATE)
    except FluxError as error:
        parser.exit(2, f"error: {error}\n")
    trainer.run(arguments.steps, (Log(run / "captioner.jsonl", 20), Save(run / STATE)))
    trainer.save(run / STATE)


if __name__ == "__main__":
    main()
