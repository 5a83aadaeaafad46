"""FLUX.1 Redux: pictures become tokens that the transformer reads after those of the text, as more text."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from flux import images
from flux.conditioning.pictures import Picture
from flux.conditioning.texts import TextConditioning
from flux.errors import FluxError
from flux.models.redux import ReduxImageEncoder
from flux.models.siglip import SiglipVision
from flux.preprocessing import PictureParams, prepare
from flux.weights import checkpoints, redux, repositories
from flux.weights.redux import ReduxFiles


@dataclass(frozen=True)
class Redux:
    """The networks that read pictures, and how pictures are made ready for the first of them."""

    files: ReduxFiles
    siglip: SiglipVision
    encoder: ReduxImageEncoder
    pictures: PictureParams

    @classmethod
    def load(cls, model: str, siglip: str | None = None, dtype: mx.Dtype | None = None) -> "Redux":
        """Both networks, lazily, in dtype; by default the weights' type of other models.

        model: a folder in diffusers' layout, ComfyUI's `style_models/`, BFL's file, or a repository of the
        Hub. siglip: SigLIP's file, folder or repository, where it is not with the model.
        FluxError where one cannot be found or loaded, or the two do not fit each other.
        """
        choose = repositories.redux_patterns
        path = checkpoints.find_files(model, choose)
        files = redux.find(path, None if siglip is None else checkpoints.find_files(siglip, choose))
        dtype = dtype or checkpoints.default_dtype()
        encoder = redux.load_redux(files, dtype)
        network, pictures = redux.load_siglip(files, dtype)
        gives, takes = network.params.hidden_size, encoder.params.redux_dim
        if gives != takes:
            raise FluxError(f"{files.siglip} gives features {gives} wide, {files.redux} takes {takes}")
        return cls(files, network, encoder, pictures)

    def check_fit(self, width: int, label: str) -> None:
        """FluxError unless a transformer, called `label`, takes texts as wide as these tokens."""
        if (gives := self.encoder.params.txt_in_features) != width:
            raise FluxError(f"{self.files.redux} gives tokens {gives} wide, {label} takes texts {width} wide")

    def __call__(self, picture: Picture) -> mx.array:
        """A picture of any size, stretched to a square and over white -> its tokens (1, N, C), lazily."""
        pixels = prepare([opaque(picture)], self.pictures).astype(self.encoder.redux_up.weight.dtype)
        return self.encoder(self.siglip(pixels))


def opaque(picture: Picture) -> Image.Image:
    """A picture laid over white, as transformers lays it: the colours below transparency are arbitrary."""
    return Image.fromarray(images.over_white(picture.pixels, picture.alpha))


# --- Text and pictures ---

Weighted = tuple[mx.array, float]  # the tokens (1, N, C) of a picture, and its strength


def check_strength(name: str, strength: float) -> None:
    """FluxError, naming the picture, for a strength that is not above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise FluxError(
            f"the strength of {name or 'a picture'} for Redux must be above 0 and at most 1, not {strength}"
        )


def count_tokens(redux: Redux | None, pictures: Sequence[tuple[Picture, float]], blend: bool) -> int:
    """How many tokens a request's pictures become; FluxError where they are some and there is no Redux."""
    if not pictures:
        return 0
    if redux is None:
        name = pictures[0][0].name or "a picture"
        raise FluxError(f"{name} needs FLUX.1 Redux: FluxPipeline(redux=...), or --redux-model")
    return redux.siglip.params.tokens * (1 if blend else len(pictures))


def appended(text: TextConditioning, pictures: Sequence[Weighted]) -> TextConditioning:
    """The text (1, L, C) with the tokens of N pictures after it, times their strengths: (1, L + N * 729, C).

    The pictures stand one after the other, as in ComfyUI, where several nodes do that; for one picture of
    strength 1 the same as diffusers.
    """
    tokens = [strength * tokens for tokens, strength in pictures]
    return text._replace(t5=mx.concatenate([text.t5, *tokens], axis=1))


def blended(text: TextConditioning, pictures: Sequence[Weighted]) -> TextConditioning:
    """The sum, over the pictures, of the text with this picture's tokens after it, times its strength.

    As in diffusers, where it is of prompt_embeds_scale and pooled_prompt_embeds_scale: the text, and CLIP's
    vector, count as much as all strengths together.
    """
    total = sum(strength for _, strength in pictures)
    tokens = sum((strength * tokens for tokens, strength in pictures[1:]), pictures[0][1] * pictures[0][0])
    return TextConditioning(mx.concatenate([total * text.t5, tokens], axis=1), total * text.clip)
