"""Flow matching: a sample is noised to a random time, and the transformer is asked the way back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from flux import sampler
from flux.adapters import draw_dropout
from flux.errors import FluxError
from flux.training import losses
from flux.training.trainer import Metrics

DELTA_SCHEDULES = ("constant", "exponential")


Predict = Callable[[mx.array, mx.array], mx.array]  # x_t and times (B,) -> velocity, of x_t's shape


def velocity_error(
    predict: Predict,
    x0: mx.array,
    noise: mx.array,
    times: mx.array,
    error: Callable[[mx.array, mx.array], mx.array],
) -> mx.array:
    """error(velocity, noise - x0) at x_t = (1 - t) x0 + t noise: what every training of a flow minimises.

    Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206. x0, noise (B, ...), times (B,).
    """
    return error(predict(losses.noised(x0, noise, times), times), noise - x0)


def random_guidance_loss(
    predict: Callable[[mx.array, mx.array, mx.array], mx.array],
    latent: mx.array,
    keys: tuple[mx.array, mx.array, mx.array],
    time_shift: float,
) -> mx.array:
    """The mean squared error with which a flow is trained from nothing, float32.

    predict: packed x_t (B, L, 4z), times (B,) and guidance (B,) -> velocity. latent (B, h, w, z), scaled.
    keys: for noise, times and guidance. The guidance is random and means nothing, so that every value of it
    gives the same picture. Half of the times are rounded as the network rounds them in 16-bit types, so that
    it knows both.
    """
    x0 = sampler.pack(latent)  # (B, L, 4z)
    noise = mx.random.normal(x0.shape, key=keys[0])
    times = losses.flow_times(len(x0), time_shift, keys[1])
    half = len(x0) // 2
    rounded = (1000 * times[:half]).astype(mx.bfloat16).astype(mx.float32) / 1000
    times = mx.concatenate([rounded, times[half:]])
    guidance = mx.random.uniform(0, 5, (len(x0),), key=keys[2])
    mse = partial(losses.error, "mse")
    return velocity_error(lambda x, t: predict(x, t, guidance), x0, noise, times, mse).mean()


@dataclass(frozen=True)
class FlowLoss:
    """The loss of fine-tuning, as the trainer takes it: (model, batch, key) -> loss, metrics.

    The model has `flow`, the transformer, and for batches with `clip_ids` also `clip`. A batch of B:
    - mean, logvar (B, h, w, z), the autoencoder's moments, and keys (B, 2), uint32, a random key a sample, of
      which its latent, noise and time are made: in any batch and on any rank it has the same loss;
    - t5 (B, L, C), T5's features, and clip (B, D), CLIP's pooled vector, or clip_ids (B, 77) instead;
    - is_reg (B,), 1 for a regularisation picture: its loss counts `prior_weight` times;
    - mask (B, h, w), if any, in 0..1: a sample's loss is the mean of its elements weighted by the mask, so
      that a small subject counts as much as a large one; 0 where the mask is empty;
    - times (B,), if any, replace the random ones: for validation.
    The trainer's key is for dropout alone, which belongs to the step.

    shift_factor, scale_factor: the autoencoder's. time_sampling, time_scale, time_mean, time_std: see
    `losses.sample_times`. loss, delta: see `losses.error`; delta_schedule "exponential" makes it delta^t,
    from 1 for a picture to delta for noise. guidance: what a model with a guidance embedder is told.
    end_token: of CLIP's tokenizer, needed where CLIP is trained. FluxError for names that there are not.
    """

    shift_factor: float
    scale_factor: float
    time_sampling: str = "sigmoid"
    time_scale: float = 1.0
    time_mean: float = 0.0
    time_std: float = 1.0
    loss: str = "mse"
    delta: float = 0.1
    delta_schedule: str = "constant"
    guidance: float = 1.0
    prior_weight: float = 1.0
    end_token: int | None = None

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("time sampling", self.time_sampling, losses.TIME_SAMPLING),
            ("loss", self.loss, losses.LOSSES),
            ("schedule of delta", self.delta_schedule, DELTA_SCHEDULES),
        ):
            if name not in known:
                raise FluxError(f"unknown {kind} {name!r}: choose {', '.join(known)}")
        if self.delta <= 0:
            raise FluxError(f"delta {self.delta}: give a number above 0")

    def __call__(
        self, model: nn.Module, batch: dict[str, mx.array], key: mx.array
    ) -> tuple[mx.array, Metrics]:
        draw_dropout(model, key)
        weights = 1 + (self.prior_weight - 1) * batch["is_reg"]
        return (weights * self.per_sample(model, batch)).mean(), {}

    def per_sample(self, model: nn.Module, batch: dict[str, mx.array]) -> mx.array:
        """The samples' losses (B,), float32, without the weight of regularisation pictures."""
        x0, noise, times = self._draw(batch)
        size = (x0.shape[1], x0.shape[2])
        t5, pooled = batch["t5"], self._pooled(model, batch)
        guidance = mx.full((len(t5),), self.guidance)  # a model without the embedder does not look at it
        positions = sampler.image_positions(size), sampler.text_positions(t5.shape[1])

        def predict(x: mx.array, times: mx.array) -> mx.array:
            velocity = model.flow(sampler.pack(x), positions[0], t5, positions[1], times, pooled, guidance)
            return sampler.unpack(velocity, size)

        delta: mx.array | float = self.delta
        if self.delta_schedule == "exponential":
            delta = (delta**times)[:, None, None, None]
        elements = partial(losses.error, self.loss, delta=delta)
        error = velocity_error(predict, x0, noise, times, elements)  # (B, h, w, z)
        if "mask" not in batch:
            return error.mean(axis=(1, 2, 3))
        mask = batch["mask"]
        return (error.mean(axis=3) * mask).sum(axis=(1, 2)) / mx.maximum(mask.sum(axis=(1, 2)), 1e-6)

    def _draw(self, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """x_0 and noise (B, h, w, z) and times (B,), each sample from another key."""
        mean, logvar = (batch[name].astype(mx.float32) for name in ("mean", "logvar"))
        keys = [mx.random.split(key, 3) for key in batch["keys"]]
        posterior, noise = (
            mx.stack([mx.random.normal(mean.shape[1:], key=sample[i]) for sample in keys]) for i in (0, 1)
        )
        x0 = self.scale_factor * (losses.posterior(mean, logvar, posterior) - self.shift_factor)
        if "times" in batch:
            return x0, noise, batch["times"]
        tokens = mean.shape[1] * mean.shape[2] // 4
        settings = {"scale": self.time_scale, "mean": self.time_mean, "std": self.time_std}
        times = [losses.sample_times(self.time_sampling, key[2], 1, tokens, **settings) for key in keys]
        return x0, noise, mx.concatenate(times)

    def _pooled(self, model: nn.Module, batch: dict[str, mx.array]) -> mx.array:
        if "clip_ids" not in batch:
            return batch["clip"]
        if self.end_token is None:
            raise ValueError("a batch with clip_ids needs the loss's end_token")
        return model.clip(batch["clip_ids"], self.end_token).pooled_output
