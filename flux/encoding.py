"""What the encoders say of requests: each text and each picture once."""

from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from flux import images
from flux.conditioning import Picture, PictureConditioning
from flux.conditioning.controlnets import Fit
from flux.conditioning.encoded import NO_PICTURES
from flux.conditioning.encoder import PictureEncoder
from flux.conditioning.redux import appended, blended
from flux.denoising import Conditioning
from flux.requests import ResolvedRequest, TextKey
from flux.weights import registry

if TYPE_CHECKING:
    from flux.pipeline import FluxPipeline


class Encoded(NamedTuple):
    """What encoders say of requests, evaluated: of texts, by `ResolvedRequest.texts`, and of pictures."""

    texts: dict[TextKey, Conditioning]
    pictures: Mapping[ResolvedRequest, PictureConditioning] = MappingProxyType({})  # by `.pictures`
    redux: Mapping[Picture, mx.array] = MappingProxyType({})  # the tokens (1, N, C) of each picture

    def conditioning(self, request: ResolvedRequest) -> Conditioning:
        """A request's texts, the prompt's with the tokens of its pictures; lazily."""
        texts = self.texts[request.texts]
        if not request.redux:
            return texts
        combine = blended if request.redux_blend else appended
        pictures = [(self.redux[picture], strength) for picture, strength in request.redux]
        return texts._replace(positive=combine(texts.positive, pictures))


def encode(pipeline: "FluxPipeline", requests: Iterable[ResolvedRequest]) -> Encoded:
    """What the encoders say of resolved requests, evaluated; each text and picture is encoded once."""
    requests = list(requests)
    texts = {
        request.texts: pipeline.encode(
            request.prompt, request.negative_prompt, request.cfg_scale, request.clip_prompt, request.nag
        )
        for request in {request.texts: request for request in requests}.values()
    }
    pictures = {
        request: encode_pictures(pipeline, request)
        for request in dict.fromkeys(request.pictures for request in requests)
        if request.has_pictures
    }
    read = pipeline.redux
    given = dict.fromkeys(picture for request in requests for picture, _ in request.redux)
    tokens = {} if read is None else {picture: read(picture) for picture in given}
    mx.eval(texts, list(pictures.values()), list(tokens.values()))
    return Encoded(texts, pictures, tokens)


def encode_pictures(pipeline: "FluxPipeline", request: ResolvedRequest) -> PictureConditioning:
    """What a request's pictures bring to every step, not yet evaluated."""
    encoder = PictureEncoder(pipeline.encode_pixels, pipeline.downscale)
    height, width = (pipeline.downscale * side for side in request.latent_size)
    fit: Fit = partial(images.fit, size=(height, width))
    out = NO_PICTURES
    if request.edit is not None:
        canvas = pipeline.canvas(request.edit, request.image_size)
        fit = canvas.over
        out = encoder.edit(canvas, pipeline.spec.input == registry.FILL, request.strength < 1)
    if request.control is not None:
        channels = encoder.control(request.control, request.control_edges, fit)
        out = out._replace(channels=channels)
    if request.references:
        tokens, positions = encoder.references(request.references)
        out = out._replace(tokens=tokens, positions=positions)
    controls = pipeline.controlnets.encode(request.controlnets, fit, pipeline.encode_picture)
    return out._replace(controls=controls)
