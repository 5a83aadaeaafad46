"""Florence-2 (Xiao et al. 2023, arXiv:2311.06242): a picture and a prompt in, text and positions out.

The vision tower's features become tokens, which the language model's encoder reads before those of the
prompt; its decoder writes the answer. Attribute names are those of transformers' checkpoints, less their
outer `model.`.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from flux.errors import FluxError
from flux.models.florence2.language import LanguageModel, LanguageParams
from flux.models.florence2.vision import VisionParams, VisionTower


@dataclass(frozen=True)
class Florence2Params:
    """The shape of the whole; the defaults are Florence-2-base's.

    max_position_embeddings: rows (and columns) of the tower's output that have a position embedding.
    max_temporal_embeddings: frames that have one; pictures use the first.
    """

    vision: VisionParams = field(default_factory=VisionParams)
    language: LanguageParams = field(default_factory=LanguageParams)
    max_position_embeddings: int = 50
    max_temporal_embeddings: int = 100


class PositionEmbedding2D(nn.Module):
    """Learned: half of the channels say the column, the other half the row."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.row_embeddings = nn.Embedding(size, width // 2)
        self.column_embeddings = nn.Embedding(size, width - width // 2)

    def __call__(self, height: int, width: int) -> mx.array:
        """(height, width, C). Raises FluxError for more rows or columns than were learned."""
        limit = self.row_embeddings.weight.shape[0]
        if max(height, width) > limit:
            raise FluxError(
                f"a feature map of {width} x {height}; the captioner knows {limit} x {limit} at most"
            )
        columns = self.column_embeddings.weight[None, :width]
        rows = self.row_embeddings.weight[:height, None]
        columns = mx.broadcast_to(columns, (height, width, columns.shape[-1]))
        rows = mx.broadcast_to(rows, (height, width, rows.shape[-1]))
        return mx.concatenate([columns, rows], axis=-1)


class TemporalEmbedding(nn.Module):
    """Fixed sines and cosines of the frame's number. A parameter, as checkpoints hold the table."""

    def __init__(self, frames: int, width: int):
        super().__init__()
        frequencies = mx.power(10000.0, -mx.arange(width // 2) / (width // 2))
        angles = mx.arange(frames)[:, None] * frequencies  # (frames, C / 2)
        self.pos_idx_to_embed = mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).flatten(1)
        self.freeze()  # it is not a weight to train

    def __call__(self, frame: int) -> mx.array:
        return self.pos_idx_to_embed[frame]


class Projector(nn.Module):
    """From the tower's features to tokens of the language model."""

    def __init__(self, params: Florence2Params):
        super().__init__()
        in_width, width = params.vision.embed_dim[-1], params.language.d_model
        self.image_position_embed = PositionEmbedding2D(params.max_position_embeddings, in_width)
        self.visual_temporal_embed = TemporalEmbedding(params.max_temporal_embeddings, in_width)
        self.image_projection = nn.Linear(in_width, width, bias=False)
        self.image_proj_norm = nn.LayerNorm(width)

    def __call__(self, features: mx.array) -> mx.array:
        """(B, h, w, C) -> (B, 1 + h * w, language model's C): the mean of all features, then all of them."""
        x = features + self.image_position_embed(*features.shape[1:3])
        x = x + self.visual_temporal_embed(0)  # a picture is a film of one frame
        x = x.flatten(1, 2)
        x = mx.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        return self.image_proj_norm(self.image_projection(x))


class Florence2(nn.Module):
    """The vision tower, the projection of its features, and the language model that reads them."""

    def __init__(self, params: Florence2Params):
        super().__init__()
        self.vision_tower = VisionTower(params.vision)
        self.multi_modal_projector = Projector(params)
        self.language_model = LanguageModel(params.language)

    def image_features(self, pixels: mx.array) -> mx.array:
        """Normalised pictures (B, H, W, 3) -> their tokens (B, 1 + H / 32 * W / 32, C)."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def encode(
        self, pixels: mx.array, tokens: mx.array, prompt_mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """What the decoder looks at: the encoder's output, and a mask that is False at padding.

        pixels (B, H, W, 3); tokens (B, L), the prompts with start and end token; prompt_mask (B, L), True at
        tokens and False at padding, None where no prompt is padded. -> (B, S, C) with S = picture's tokens +
        L, and (B, 1, 1, S) or None.
        """
        return self.read(self.image_features(pixels), tokens, prompt_mask)

    def read(
        self, image: mx.array, tokens: mx.array, prompt_mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """`encode` from the pictures' tokens (B, P, C) on."""
        mask = None
        if prompt_mask is not None:
            seen = mx.ones(image.shape[:2], dtype=mx.bool_)
            mask = mx.concatenate([seen, prompt_mask.astype(mx.bool_)], axis=1)[:, None, None]
        embeddings = mx.concatenate([image, self.language_model.shared(tokens)], axis=1)
        return self.language_model.encoder(embeddings, mask), mask

    def __call__(
        self, pixels: mx.array, tokens: mx.array, answers: mx.array, prompt_mask: mx.array | None = None
    ) -> mx.array:
        """Scores of the token that follows each of the answers' (B, L), which start with the start token.

        The other arguments as in `encode`. -> (B, L, vocabulary). `generate` goes by steps instead.
        """
        return self.scores(*self.encode(pixels, tokens, prompt_mask), answers)

    def scores(self, encoded: mx.array, mask: mx.array | None, answers: mx.array) -> mx.array:
        """`__call__` from what `encode` gave on."""
        cache = self.language_model.cache(encoded, mask)
        return self.language_model.logits(self.language_model.decode(answers, cache))
