"""What a step minimises: one function a loss, and their sum for the trainer.

All of a step's losses are one scalar with one gradient. The adversaries are kept apart by stopping gradients:
the autoencoder's term sees a discriminator that takes none, the discriminator's sees pictures that pass none.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from flux import images, sampler
from flux.training import losses
from flux.training.flow_matching import random_guidance_loss
from flux.training.pretrain.adversary import hinge, r1
from flux.training.pretrain.config import Step
from flux.training.pretrain.networks import WHOLE, Networks, mapped
from flux.training.trainer import Metrics

Moments = tuple[mx.array, mx.array]  # mean and log variance of latents
Perceptual = Callable[[mx.array, mx.array], mx.array]  # two (B, H, W, 3) -> distances (B,)


def threshold_metrics(step: Step) -> tuple[str, ...]:
    """The metrics that every batch of this step has; `r1` comes besides, every `r1_interval` batches."""
    names = ["loss"]
    names += ["mse", "kl", "beta"] if step.decodes else []
    names += ["vae"] if step.reconstructs else []
    names += ["lpips"] if step.use_lpips else []
    names += ["generator", "discriminator"] if step.gan_training else []
    return (*names, "flow") if step.train_diff else tuple(names)


class Objective:
    """The loss of a step, as the trainer takes it.

    A batch: `pictures` (B, H, W, 3) uint8, or for the flow alone `mean` and `logvar` (B, h, w, z), what a
    frozen autoencoder makes of them; for the autoencoder `beta`, the weight of the KL term, and `r1`,
    whether this is a batch of the penalty; for the flow `clip` and `t5`, token ids (B, L).
    """

    def __init__(self, step: Step, perceptual: Perceptual | None = None, half: bool = False, end: int = 0):
        self._step = step
        self._perceptual = perceptual
        self._half = half
        self._end = end  # CLIP's end token

    def __call__(self, model: Networks, batch: dict[str, Any], key: mx.array) -> tuple[mx.array, Metrics]:
        vae_key, flow_key = mx.random.split(key)
        total = mx.array(0.0)
        metrics: Metrics = {}
        with mapped(model, _to_bfloat16) if self._half else nullcontext():
            if "pictures" in batch:
                x = images.normalize(batch["pictures"])
            if self._step.decodes:
                loss, more = self._autoencoder(model, x, batch, vae_key)
                total, metrics = total + loss, metrics | more
            if self._step.train_diff:
                encoded = (batch["mean"], batch["logvar"]) if "mean" in batch else moments(model, x)
                loss = flow_loss(model, encoded, batch, flow_key, self._step.time_shift, self._end)
                total, metrics["flow"] = total + loss, loss
        return total, metrics

    def _autoencoder(
        self, model: Networks, x: mx.array, batch: dict[str, Any], key: mx.array
    ) -> tuple[mx.array, Metrics]:
        step = self._step
        latent_key, noise_key = mx.random.split(key)
        mean, logvar = moments(model, x)
        z = losses.posterior(mean, logvar, mx.random.normal(mean.shape, key=latent_key))
        y = model.ae.decoder(z.astype(model.dtype)).astype(mx.float32)
        error, mse = losses.reconstruction(y, x, step.mse_weight)
        kl = losses.kl(mean, logvar, step.kl_free_bits)
        total = batch["beta"] * kl
        metrics = {"mse": mse, "kl": kl, "beta": batch["beta"]}
        if step.reconstructs:
            total, metrics["vae"] = total + error, error
            if step.use_lpips and self._perceptual is not None:
                metrics["lpips"] = self._perceptual(y, x).mean()
                total = total + step.lambda_lpips * metrics["lpips"]
        if step.gan_training:
            noise = step.instance_noise_std and step.instance_noise_std * mx.random.normal(
                (2, *x.shape), key=noise_key
            )
            loss, more = adversarial_loss(model, x, y, noise, step, batch["r1"])
            total, metrics = total + loss, metrics | more
        return total, metrics


def adversarial_loss(
    model: Networks, real: mx.array, fake: mx.array, noise: mx.array | float, step: Step, with_r1: bool
) -> tuple[mx.array, Metrics]:
    """Both sides of the game on pictures (B, H, W, 3). noise (2, B, H, W, 3) or 0 is added to what is judged.

    The generator's -lambda_adv D(fake) moves the autoencoder alone; hinge and (gamma / 2) R1, in batches
    `with_r1`, move the discriminator alone.
    """
    if not isinstance(noise, float):
        real, fake = real + noise[0], fake + noise[1]
    real, fake = real.astype(model.dtype), fake.astype(model.dtype)
    with mapped(model.discriminator, mx.stop_gradient):
        generator = -model.discriminator(fake).astype(mx.float32).mean()
    scores = model.discriminator(mx.concatenate([real, mx.stop_gradient(fake)])).astype(mx.float32)
    discriminator = hinge(*mx.split(scores, 2))
    total = step.lambda_adv * generator + discriminator
    metrics = {"generator": generator, "discriminator": discriminator}
    if with_r1:
        metrics["r1"] = r1(model.discriminator, real)
        total = total + step.r1_gamma / 2 * metrics["r1"]
    return total, metrics


def flow_loss(
    model: Networks, encoded: Moments, batch: dict[str, Any], key: mx.array, time_shift: float, end: int
) -> mx.array:
    """The flow's error for latents with these moments (B, h, w, z), at the autoencoder's scale."""
    latent_key, noise_key, time_key, guidance_key = mx.random.split(key, 4)
    mean, logvar = encoded
    z = losses.posterior(mean, logvar, mx.random.normal(mean.shape, key=latent_key))
    params = model.ae.params
    latent = mx.stop_gradient(params.scale_factor * (z - params.shift_factor))  # (B, h, w, z)
    text = model.t5(batch["t5"])
    pooled = model.clip(batch["clip"], end).pooled_output
    positions = (
        sampler.image_positions((latent.shape[1], latent.shape[2])),
        sampler.text_positions(text.shape[1]),
    )

    def predict(x: mx.array, times: mx.array, guidance: mx.array) -> mx.array:
        return model.flow(x, positions[0], text, positions[1], times, pooled, guidance)

    return random_guidance_loss(predict, latent, (noise_key, time_key, guidance_key), time_shift)


def encode(model: Networks, x: mx.array, half: bool) -> Moments:
    """`moments` as the loss computes them, half: in bfloat16."""
    with mapped(model.ae, _to_bfloat16) if half else nullcontext():
        return moments(model, x)


def moments(model: Networks, x: mx.array) -> Moments:
    """Mean and log variance (B, h, w, z), float32, of pictures x (B, H, W, 3)."""
    mean, logvar = model.ae.moments(x.astype(model.dtype), WHOLE)
    return mean.astype(mx.float32), logvar.astype(mx.float32)


def _to_bfloat16(parameter: mx.array) -> mx.array:
    return parameter.astype(mx.bfloat16) if parameter.dtype == mx.float32 else parameter
