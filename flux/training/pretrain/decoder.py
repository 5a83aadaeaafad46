"""Beside stage 2: the decoder alone, further, on the frozen encoder's latents.

    python -m flux.training.pretrain.decoder --run DIR --steps N

DIR holds the latents (`python -m flux.training.pretrain.latents`). Without the encoder a step costs two
thirds. Stopped at any moment it goes on from the last state in DIR.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux.models.autoencoder import AutoEncoder
from flux.training import losses
from flux.training.ema import EMA
from flux.training.optimizers import muon, warmup_decay
from flux.training.pretrain import tiny
from flux.training.pretrain.autoencoder import is_edge
from flux.training.pretrain.callbacks import Log, Save
from flux.training.pretrain.emoji import Renderer
from flux.training.pretrain.latents import Latents, load_state, read
from flux.training.trainer import Trainer


def decoder_batches(latents: Latents, count: int, seed: int) -> Callable[[int], dict[str, mx.array]]:
    """step -> moments (count, 8, 8, 16) of raw latents and their pictures (count, 64, 64, 3) uint8."""
    render = Renderer()

    def batch(step: int) -> dict[str, mx.array]:
        rows = latents.draw(np.random.default_rng((seed, step)), count)
        return {
            "mean": mx.array(latents.mean[rows]),
            "logvar": mx.array(latents.logvar[rows]),
            "pictures": mx.array(np.stack([render(latents.compositions[i]) for i in rows])),
        }

    return batch


def decoder_loss(
    model: nn.Module, batch: dict[str, mx.array], key: mx.array, mse_weight: float
) -> tuple[mx.array, dict[str, mx.array]]:
    """L1 + MSE of the pictures decoded from samples of their latents, as the joint training had them."""
    mean = batch["mean"]
    z = mean + mx.exp(0.5 * batch["logvar"]) * mx.random.normal(mean.shape, key=key)
    target = batch["pictures"].astype(mx.float32) / 127.5 - 1
    error, mse = losses.reconstruction(model(z), target, mse_weight)
    return error, {"mse": mse}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: latents, state, log")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.01, help="Muon's learning rate; AdamW's is an eighth")
    parser.add_argument("--mse-weight", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run, steps, rate = arguments.run, arguments.steps, arguments.rate
    model = AutoEncoder(tiny.AUTOENCODER)
    load_state(model, run / "autoencoder.safetensors")
    decoder = model.decoder
    warmup = min(50, steps)
    optimizer = muon(
        warmup_decay(rate, steps, warmup, 0.2), warmup_decay(rate / 8, steps, warmup, 0.2), is_edge
    )
    trainer = Trainer(
        decoder,
        partial(decoder_loss, mse_weight=arguments.mse_weight),
        decoder_batches(read(run / "latents.safetensors"), arguments.batch, arguments.seed),
        optimizer,
        arguments.seed,
        EMA(decoder, tiny.DECODER_EMA_DECAY),
    )
    state = run / "decoder.safetensors"
    if state.exists():
        trainer.load(state)
    trainer.run(steps, (Log(run / "decoder.jsonl", tiny.LOG_STEPS), Save(state)))
    trainer.save(state)


if __name__ == "__main__":
    main()
