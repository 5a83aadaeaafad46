"""Trains the built-in captioner: python -m flux.recipes.captioner --run DIR

First the vision tower learns to say which subject is where, then the language model to put what the tower
sees into words, then both together, on other pictures. Stopped at any moment it goes on from the last state
in DIR.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from flux.arguments import described, run_program
from flux.captioning.tokenizer import BartTokenizer
from flux.distributed.ranks import Ranks
from flux.models.florence2 import Florence2, VisionParams
from flux.models.florence2.vision import VisionTower
from flux.pipeline import FluxPipeline
from flux.recipes.captioner import recipe
from flux.recipes.captioner.pictures import Pictures, Pool, captioned, features, normalised
from flux.training.callbacks import logged_and_saved
from flux.training.matmul_convolution import use_products
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.states import load_state
from flux.training.trainer import Batches, Loss, Trainer

TOWER, LANGUAGE, STATE = "tower.safetensors", "language.safetensors", "captioner.safetensors"
WARMUP = 20  # steps
LOG_STEPS = 25


class ProbedTower(nn.Module):
    """The vision tower, and a probe that says from its features which subject is where.

    Captions alone would give the tower one hint a picture, a name among a dozen words that are easier; the
    probe gives one at every place. It is not part of what is exported.
    """

    def __init__(self, params: VisionParams):
        super().__init__()
        self.tower = VisionTower(params)
        self.norm = nn.LayerNorm(params.embed_dim[-1])
        self.probe = nn.Linear(params.embed_dim[-1], recipe.SUBJECTS + 1)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Normalised pictures (B, H, W, 3) -> scores of each subject, and of none, (B, h, w, S + 1)."""
        return self.probe(self.norm(self.tower(pixels)))


def tower_loss(
    model: ProbedTower, batch: dict[str, mx.array], key: mx.array
) -> tuple[mx.array, dict[str, mx.array]]:
    """Cross entropy of the subjects at all places, with the share of the place that each takes as its target.

    Metric: the share of places whose likeliest subject takes most of it.
    """
    scores = model(normalised(batch["pictures"]))
    right = (scores.argmax(axis=-1) == batch["places"].argmax(axis=-1)).mean()
    return nn.losses.cross_entropy(scores, batch["places"]).mean(), {"right": right}


def caption_loss(
    model: Florence2, batch: dict[str, mx.array], key: mx.array, pad: int
) -> tuple[mx.array, dict[str, mx.array]]:
    """Mean cross entropy of the answers' tokens, each predicted from those before it.

    What is shown is pictures, or with a frozen tower its features.
    Metric: the share of tokens whose likeliest prediction is right.
    """
    answers = batch["answers"]
    start = mx.full((len(answers), 1), recipe.GENERATION.decoder_start_token_id, answers.dtype)
    shifted = mx.concatenate([start, answers[:, :-1]], axis=1)
    shown = batch["shown"]
    if shown.dtype == mx.uint8:
        shown = model.vision_tower(normalised(shown))  # (B, h, w, C)
    image = model.multi_modal_projector(shown)
    logits = model.scores(*model.read(image, batch["prompts"], batch["mask"]), shifted)  # (B, L, vocabulary)
    counts = answers != pad
    total = counts.sum()
    loss = (nn.losses.cross_entropy(logits, answers) * counts).sum() / total
    return loss, {"right": ((logits.argmax(axis=-1) == answers) * counts).sum() / total}


def is_edge(name: str, parameter: mx.array) -> bool:
    """What Muon does not suit: embeddings, the layers at pixels and at names, depthwise convolutions."""
    edges = ("probe", "shared", "embed_positions", "position_embed", "convs.0", "conv1", "conv2")
    return any(edge in name for edge in edges)


def make_captioner(tokenizer: BartTokenizer) -> Florence2:
    """With random weights."""
    model = Florence2(recipe.params(tokenizer))
    # As large as the features that they are added to: else places are learned late.
    positions = model.multi_modal_projector.image_position_embed
    for table in (positions.row_embeddings, positions.column_embeddings):
        table.weight = mx.random.normal(table.weight.shape)
    return model


def train(
    state: Path,
    model: nn.Module,
    loss: Loss,
    make_batches: Callable[[], Batches],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Up to `steps` steps in all, from the state in the file if it is there; the state is left there.

    The batches are made for the first step: a part that is done needs none.
    """
    made = cache(make_batches)
    main_rate, adam_rate = (warmup_decay(r, steps, min(WARMUP, steps), 0.4) for r in (rate, rate / 10))
    trainer = Trainer(model, loss, lambda number: made()(number), muon(main_rate, adam_rate, is_edge), seed)
    if state.exists():
        trainer.load(state)
    if trainer.step < steps:
        trainer.run(steps, logged_and_saved(state.with_suffix(".jsonl"), state, LOG_STEPS))
        trainer.save(state)


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Train the captioner, or go on with it."""
    parser = described(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: states, logs, vocabulary")
    parser.add_argument("--tower-steps", type=int, default=450, help="(default: %(default)s)")
    parser.add_argument("--language-steps", type=int, default=420, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of both (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is a tenth")
    parser.add_argument(
        "--pictures",
        type=int,
        default=8000,
        help="for the first two, and for the last (default: %(default)s)",
    )
    parser.add_argument("--pool", type=int, default=1000, help="through the generator's autoencoder")
    parser.add_argument("--generator", default="tiny", help="whose that is (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run, seed = arguments.run, arguments.seed
    tokenizer = recipe.load_tokenizer(run / "tokenizer")
    pool = None
    if arguments.pool:
        pool = Pool(FluxPipeline(arguments.generator).ae, arguments.pool, run)
    pictures = cache(lambda number: Pictures(arguments.pictures, number, run, pool))
    mx.random.seed(seed)
    probed, model = ProbedTower(recipe.VISION), make_captioner(tokenizer)
    if mx.default_device().type == mx.cpu:
        use_products(probed)
        use_products(model)
    batch, rate = arguments.batch, arguments.rate

    def whole() -> Batches:
        return pictures(seed).batches(batch, seed)

    def seen() -> Batches:
        found = features(model.vision_tower, pictures(seed).pixels)
        return captioned(found, pictures(seed).compositions, tokenizer, batch, seed)

    def others() -> Batches:
        fresh = pictures(seed + 1)
        return captioned(fresh.pixels, fresh.compositions, tokenizer, batch, seed)

    train(run / TOWER, probed, tower_loss, whole, arguments.tower_steps, rate, seed)
    load_state(model.vision_tower, run / TOWER, "model.tower")
    model.vision_tower.freeze()
    loss = partial(caption_loss, pad=tokenizer.pad_token_id)
    train(run / LANGUAGE, model, loss, seen, arguments.language_steps, rate, seed)
    load_state(model, run / LANGUAGE)
    model.vision_tower.unfreeze()
    train(run / STATE, model, loss, others, arguments.steps, rate / 4, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
