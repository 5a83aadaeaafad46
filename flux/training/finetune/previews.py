"""What is looked at during a training: validation loss and progress pictures. Neither disturbs it."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux import images
from flux.pipeline import FluxPipeline
from flux.training.finetune.features import Features, sample_key
from flux.training.finetune.model import Base, Network
from flux.training.flow_matching import FlowLoss

TIMES = (0.125, 0.375, 0.625, 0.875)  # of every validation picture
VALIDATION_SEED = 0x56414C49  # the same in every run, so that runs can be compared


def validation_loss(network: Network, features: Features, loss: FlowLoss) -> float:
    """The mean loss of the pictures held out, each at all TIMES, with noise that is always the same."""
    total, count = 0.0, 0
    network.eval()  # no dropout
    for batch in features.plan.validation():
        arrays = features.batch(batch, lambda position: sample_key(VALIDATION_SEED, position))
        for time in TIMES:
            losses = loss.per_sample(network, arrays | {"times": mx.full((len(batch.entries),), time)})
            total, count = total + losses.sum().item(), count + len(batch.entries)
    network.train()
    return total / count


class Pictures:
    """Pictures of some prompts, the same seeds each time."""

    def __init__(
        self, base: Base, features: Features, prompts: tuple[str, ...], size: tuple[int, int], seed: int
    ):
        """size: (height, width) in pixels."""
        self.prompts = prompts
        self._base = base
        self._features = features
        self._latent_size = base.pipeline.latent_size(size)
        self._seed = seed
        spec = base.pipeline.spec
        self.negative = "" if spec.cfg_scale != 1 else None

    def texts(self) -> list[str]:
        """What must be encoded for them."""
        return [*self.prompts, *([self.negative] if self.negative is not None and self.prompts else [])]

    def draw(self, network: Network, path: Path | None) -> None:
        """Writes the pictures side by side. The autoencoder is in memory only while it decodes them.

        path: None on a rank that only takes part in the transformer's work.
        """
        pipeline = self._base.pipeline
        network.eval()
        latents = [self._latent(pipeline, network, i) for i in range(len(self.prompts))]
        network.train()
        if path is None:
            return
        self._base.load_ae()
        pictures = [images.to_uint8(pipeline.decode(x, self._latent_size))[0] for x in latents]
        del pipeline.ae
        mx.clear_cache()
        text = {"prompt": "\n".join(self.prompts), "seed": str(self._seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save(path, images.grid([np.array(picture) for picture in pictures]), text)

    def _latent(self, pipeline: FluxPipeline, network: Network, i: int) -> mx.array:
        spec = pipeline.spec
        conditioning = self._features.conditioning(self.prompts[i], self.negative, self._pooled(network))
        noise = pipeline.noise([self._seed], self._latent_size)
        settings = (noise, self._latent_size, spec.steps, spec.guidance, spec.cfg_scale)
        for x in pipeline.denoise(pipeline.prepare(conditioning, *settings)):
            mx.eval(x)
        return x

    def _pooled(self, network: Network) -> Callable[[mx.array], mx.array]:
        return lambda ids: network.clip(ids, self._base.end_token).pooled_output
