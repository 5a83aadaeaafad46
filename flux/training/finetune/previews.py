"""What is looked at during a training: validation loss and progress pictures. Neither disturbs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux import generation, images
from flux.encoding import Encoded
from flux.requests import Request
from flux.training.finetune.features import Features
from flux.training.finetune.model import Base, Network
from flux.training.flow_matching import FlowLoss

TIMES = (0.125, 0.375, 0.625, 0.875)  # of every validation picture
VALIDATION_SEED = 0x56414C49  # the same in every run, so that runs can be compared


def validation_loss(network: Network, features: Features, loss: FlowLoss) -> float:
    """The mean loss of the pictures held out, each at all TIMES, with noise that is always the same."""
    sums: list[Any] = []
    count = 0
    network.eval()  # no dropout
    for batch in features.plan.validation():
        arrays = features.batch(batch, VALIDATION_SEED)
        for time in TIMES:
            losses = loss.per_sample(network, arrays | {"times": mx.full((len(batch.entries),), time)})
            sums.append(losses.sum().item())
            count += len(batch.entries)
    network.train()
    return sum(sums) / count


class Pictures:
    """Pictures of some prompts, the same seeds each time."""

    def __init__(
        self, base: Base, features: Features, prompts: tuple[str, ...], size: tuple[int, int], seed: int
    ):
        """size: (height, width) in pixels."""
        self._base = base
        self._features = features
        self._requests = [
            Request(prompt, seeds=(seed,), image_size=size).resolved(base.pipeline) for prompt in prompts
        ]

    def texts(self) -> list[str]:
        """What must be encoded for them."""
        return [text for request in self._requests for text in request.texts if text is not None]

    def draw(self, network: Network, path: Path | None) -> None:
        """Writes the pictures side by side. The autoencoder is in memory only while it decodes them.

        path: None on a rank that only takes part in the transformer's work.
        """
        pipeline = self._base.pipeline
        network.eval()
        texts = {
            request.texts: self._features.conditioning(
                request.prompt, request.texts[1], self._pooled(network)
            )
            for request in self._requests
        }
        latents = generation.denoise(pipeline, self._requests, Encoded(texts))
        network.train()
        if path is None:
            return
        self._base.load_ae()
        drawn = zip(self._requests, latents, strict=True)
        pictures = [generation.decode(pipeline, request, [x])[0] for request, x in drawn]
        del pipeline.ae
        mx.clear_cache()
        text = {
            "prompt": "\n".join(request.prompt for request in self._requests),
            "seed": str(self._requests[0].seeds[0]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save(path, images.grid(pictures), text)

    def _pooled(self, network: Network) -> Callable[[mx.array], mx.array]:
        return lambda ids: network.clip(ids, self._base.end_token).pooled_output
