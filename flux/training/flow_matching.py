"""The loss of fine-tuning: a sample is noised to a random time, and the transformer is asked the way back."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from flux import sampler
from flux.adapters import draw_dropout
from flux.errors import FluxError
from flux.training import losses

Metrics = dict[str, mx.array]
MAX_SEED = 2**32 - 1
DELTA_SCHEDULES = ("constant", "exponential")


def sample_key(seed: int, position: int) -> mx.array:
    """The random key (2,), uint32, of the sample at this place in a training: the two numbers."""
    if not 0 <= seed <= MAX_SEED:
        raise FluxError(f"a training's seed must lie between 0 and {MAX_SEED}, not {seed}")
    return mx.random.key((seed << 32) + position)


@dataclass(frozen=True)
class FlowLoss:
    """The loss as the trainer takes it: (model, batch, key) -> loss, metrics.

    A picture on its way from noise is x_t = (1 - t) x_0 + t noise, and the model's answer is compared with
    noise - x_0 (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206).

    The model has `flow`, the transformer, and for batches with `clip_ids` also `clip`. A batch of B:
    - mean, logvar (B, h, w, z), the autoencoder's moments, and keys (B, 2), uint32, a random key a sample, of
      which its latent, noise and time are made: in any batch and on any rank it has the same loss;
    - t5 (B, L, C), T5's features, and clip (B, D), CLIP's pooled vector, or clip_ids (B, 77) in its place;
    - is_reg (B,), 1 for a regularisation picture: its loss counts `prior_weight` times;
    - mask (B, h, w), if any, in 0..1: a sample's loss is the mean of its elements weighted by the mask, so
      that a small subject counts as much as a large one; 0 where the mask is empty;
    - times (B,), if any, take the place of the random ones: for validation.
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
                raise FluxError(f"no {kind} {name!r}: choose {', '.join(known)}")
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
        size = x0.shape[1:3]
        t5 = batch["t5"]
        velocity = model.flow(
            sampler.pack(losses.noised(x0, noise, times)),
            sampler.image_positions(size),
            t5,
            sampler.text_positions(t5.shape[1]),
            times,
            self._pooled(model, batch),
            mx.full((len(t5),), self.guidance),  # a model without the embedder does not look at it
        )
        delta = self.delta
        if self.delta_schedule == "exponential":
            delta = (delta**times)[:, None, None, None]
        error = losses.error(self.loss, sampler.unpack(velocity, size), noise - x0, delta)  # (B, h, w, z)
        if "mask" not in batch:
            return error.mean(axis=(1, 2, 3))
        mask = batch["mask"]
        return (error.mean(axis=3) * mask).sum(axis=(1, 2)) / mx.maximum(mask.sum(axis=(1, 2)), 1e-6)

    def _draw(self, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        """x_0 and noise (B, h, w, z) and times (B,), each sample from its own key."""
        mean, logvar = (batch[name].astype(mx.float32) for name in ("mean", "logvar"))
        keys = [mx.random.split(key, 3) for key in batch["keys"]]
        posterior, noise = (
            mx.stack([mx.random.normal(mean.shape[1:], key=own[i]) for own in keys]) for i in (0, 1)
        )
        x0 = self.scale_factor * (mean + mx.exp(0.5 * logvar) * posterior - self.shift_factor)
        if "times" in batch:
            return x0, noise, batch["times"]
        tokens = mean.shape[1] * mean.shape[2] // 4
        settings = {"scale": self.time_scale, "mean": self.time_mean, "std": self.time_std}
        times = [losses.sample_times(self.time_sampling, own[2], 1, tokens, **settings) for own in keys]
        return x0, noise, mx.concatenate(times)

    def _pooled(self, model: nn.Module, batch: dict[str, mx.array]) -> mx.array:
        if "clip_ids" not in batch:
            return batch["clip"]
        if self.end_token is None:
            raise ValueError("a batch with clip_ids needs the loss's end_token")
        return model.clip(batch["clip_ids"], self.end_token).pooled_output
