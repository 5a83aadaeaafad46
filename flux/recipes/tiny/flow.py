"""Stage 2 of the built-in model: the flow transformer and both text encoders, on latents made once.

    python -m flux.recipes.tiny.flow --run DIR --steps N
    mlx.launch -n 2 --backend ring -- python -m flux.recipes.tiny.flow ...

DIR holds the latents (`python -m flux.recipes.tiny.latents`). Stopped at any moment it goes on from the
last state in DIR.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux import jsonfiles, sampler
from flux.arguments import described, run_program
from flux.distributed.gradients import average_gradients
from flux.distributed.ranks import Ranks
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.recipes.emoji import PAIR, Composition, captions, compositions
from flux.recipes.tiny import recipe
from flux.recipes.tiny.latents import Latents, read, training_compositions
from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from flux.training.callbacks import logged_and_saved
from flux.training.ema import EMA
from flux.training.flow_matching import random_guidance_loss
from flux.training.optimizers import muon
from flux.training.schedules import warmup_decay
from flux.training.trainer import Trainer
from flux.training.vocabularies import save_clip, train_clip, train_t5


class TextToLatent(nn.Module):
    """The networks that are trained together: token ids and a noisy latent in, velocity out."""

    def __init__(self, clip_vocabulary: int, t5_vocabulary: int, end: int):
        super().__init__()
        self.flow = Flux(recipe.FLUX)
        self.clip = CLIPTextModel(recipe.clip_params(clip_vocabulary))
        self.t5 = T5Encoder(recipe.t5_params(t5_vocabulary))
        self._end = end

    def __call__(
        self, x: mx.array, clip_ids: mx.array, t5_ids: mx.array, times: mx.array, guidance: mx.array
    ) -> mx.array:
        """x (B, 16, 64) packed; clip_ids (B, Lc); t5_ids (B, Lt); times, guidance (B,) -> (B, 16, 64)."""
        text = self.t5(t5_ids)
        pooled = self.clip(clip_ids, self._end).pooled_output
        positions = sampler.image_positions((8, 8)), sampler.text_positions(text.shape[1])
        return self.flow(x, positions[0], text, positions[1], times, pooled, guidance)


def flow_loss(
    model: TextToLatent, batch: dict[str, mx.array], key: mx.array
) -> tuple[mx.array, dict[str, mx.array]]:
    """Mean squared error of the velocity, at logit-normal times."""

    def predict(x: mx.array, times: mx.array, guidance: mx.array) -> mx.array:
        return model(x, batch["clip"], batch["t5"], times, guidance)

    noise_key, time_key, guidance_key = mx.random.split(key, 3)
    keys = (noise_key, time_key, guidance_key)
    return random_guidance_loss(predict, batch["latents"], keys, recipe.TIME_SHIFT), {}


def flow_batches(
    latents: Latents, clip_ids: np.ndarray, t5_ids: np.ndarray, count: int, seed: int, rank: int
) -> Callable[[int], dict[str, mx.array]]:
    """step -> latents (count, 8, 8, 16) and token ids; some captions are dropped, for true guidance.

    clip_ids, t5_ids (P, K, L): up to K captions of each of P pictures, the rows after them repeated; the very
    last row of all, [-1, -1], is the empty caption's.
    """

    def batch(step: int) -> dict[str, mx.array]:
        rng = np.random.default_rng((seed, rank, step))
        pictures = latents.draw(rng, count)
        captions = rng.integers(clip_ids.shape[1], size=count)
        empty = rng.random(count) < recipe.CAPTION_DROPOUT
        rows = np.where(empty, -1, pictures), np.where(empty, -1, captions)
        return {
            "latents": mx.array(latents.scaled(pictures)),
            "clip": mx.array(clip_ids[rows]),
            "t5": mx.array(t5_ids[rows]),
        }

    return batch


def tokenize(
    chosen: list[Composition], clip: CLIPTokenizer, t5: T5Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (P + 1, K, L) of every caption of P compositions and of the empty caption, twice.

    CLIP is causal and its vector is read at the first end token, so the padding after it may be cut off.
    """
    texts = [captions(composition) for composition in chosen] + [[""]]
    most = max(map(len, texts))
    rows = [[text[i % len(text)] for i in range(most)] for text in texts]  # the shorter lists start again
    flat = sorted({text for row in rows for text in row})
    index = {text: i for i, text in enumerate(flat)}
    places = np.array([[index[text] for text in row] for row in rows])
    clip_ids = np.array([clip.encode(text) for text in flat], np.int32)
    longest = 1 + (clip_ids == clip.eos_token_id).argmax(axis=1).max()
    t5_ids = np.array([t5.encode(text) for text in flat], np.int32)
    return clip_ids[:, :longest][places], t5_ids[places]


def load_tokens(
    run: Path, chosen: list[Composition], clip: CLIPTokenizer, t5: T5Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """`tokenize`, kept in the run's folder: it takes half a minute."""
    file = run / "tokens.npz"
    if not file.exists():
        clip_ids, t5_ids = tokenize(chosen, clip, t5)
        partial = run / f"tokens.{mx.distributed.init().rank()}.npz"
        np.savez(partial, clip=clip_ids, t5=t5_ids)
        partial.replace(file)
    with np.load(file) as arrays:
        return arrays["clip"], arrays["t5"]


def load_tokenizers(run: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The vocabularies of a run, trained if they are not there yet.

    On captions of all subjects, those left for fine-tuning too: their names are words like others.
    """
    if not (run / "tokenizer_2" / "spiece.model").exists():
        pairs = [c for c in training_compositions(recipe.PAIRS) if c.place == PAIR]
        texts = [text for c in compositions(False) + pairs for text in captions(c)]
        vocab, merges = train_clip(texts, recipe.CLIP_MERGES)
        save_clip(vocab, merges, run / "tokenizer")
        train_t5(texts, recipe.T5_VOCABULARY, run / "tokenizer_2" / "spiece.model")
    return (
        CLIPTokenizer.from_folder(run / "tokenizer"),
        T5Tokenizer.from_folder(run / "tokenizer_2", recipe.T5_LENGTH),
    )


def make_model(run: Path, clip: CLIPTokenizer) -> TextToLatent:
    """The networks of a run, untrained. run: the folder with its tokenizers."""
    vocabulary = jsonfiles.read(run / "tokenizer" / "vocab.json")
    return TextToLatent(len(vocabulary), recipe.T5_VOCABULARY, clip.eos_token_id)


def is_edge(name: str, parameter: mx.array) -> bool:
    """What Muon does not suit (embeddings, layers at latent, text and time) or too slow for (modulation)."""
    edges = ("embedding", "shared", "relative_attention_bias", "img_in", "txt_in", "in_layer", "final_layer")
    return any(edge in name for edge in (*edges, "img_mod", "txt_mod", "modulation"))


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Train the text encoders and the transformer, or go on with it."""
    parser = described(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: latents, state, log")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=48, help="pictures a step and process")
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's learning rate; AdamW's is a tenth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run, steps = arguments.run, arguments.steps
    clip, t5 = load_tokenizers(run)
    latents = read(run / "latents.safetensors")
    group = mx.distributed.init()
    mx.random.seed(arguments.seed)
    model = make_model(run, clip)
    warmup = min(100, steps)
    rate, adam_rate = (warmup_decay(r, steps, warmup, 0.4) for r in (arguments.rate, arguments.rate / 10))
    clip_ids, t5_ids = load_tokens(run, latents.compositions, clip, t5)
    trainer = Trainer(
        model,
        flow_loss,
        flow_batches(latents, clip_ids, t5_ids, arguments.batch, arguments.seed, group.rank()),
        muon(rate, adam_rate, is_edge),
        seed=2 * arguments.seed + group.rank(),
        ema=EMA(model, recipe.EMA_DECAY),
        average=average_gradients(group) if group.size() > 1 else None,
    )
    state = run / "flow.safetensors"
    if state.exists():
        trainer.load(state)
    first = group.rank() == 0
    trainer.run(steps, logged_and_saved(run / "flow.jsonl", state, recipe.LOG_STEPS) if first else ())
    if first:
        trainer.save(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
