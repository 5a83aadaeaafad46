"""What the transformer is told besides the noise. So far: texts."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.tokenizers import CLIPTokenizer, T5Tokenizer


class TextConditioning(NamedTuple):
    """What the transformer knows of B texts; a tuple of arrays, so that `mx.eval` takes it.

    t5 (B, L, C): T5's features of every token. clip (B, D): CLIP's pooled vector, a summary.
    """

    t5: mx.array
    clip: mx.array


def encode_texts(
    texts: Sequence[str],
    t5: T5Encoder,
    clip: CLIPTextModel,
    t5_tokenizer: T5Tokenizer,
    clip_tokenizer: CLIPTokenizer,
    t5_padding: bool = True,
) -> TextConditioning:
    """The conditioning of B texts, not yet evaluated. Warns of what is cut from a long one.

    T5's padding is neither masked nor left out, because FLUX was trained so; without `t5_padding` texts
    are only padded to the longest of them.
    """
    for text in texts:
        warn_if_cut(text, t5_tokenizer, clip_tokenizer)
    features = t5(t5_tokenizer(texts, pad=t5_padding))  # (B, L, C)
    pooled = clip(clip_tokenizer(texts), clip_tokenizer.eos_token_id).pooled_output  # (B, D)
    return TextConditioning(features, pooled)


def warn_if_cut(text: str, t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer) -> None:
    """Warn of the end of a text that does not fit; CLIP's only when T5 reads all that it misses."""
    if cut := t5_tokenizer.truncated(text):
        warnings.warn(
            f"the prompt is longer than the model's {t5_tokenizer.max_length} tokens; left out: {cut!r}",
            stacklevel=2,
        )
    elif cut := clip_tokenizer.truncated(text):
        warnings.warn(
            f"the prompt is longer than CLIP's {clip_tokenizer.max_length} tokens; T5 reads all of it, "
            f"CLIP's summary leaves out: {cut!r}",
            stacklevel=2,
        )
