"""Texts: what T5 and CLIP say of a prompt."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from flux.jsonfiles import shown
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
    clip_texts: Sequence[str] | None = None,
) -> TextConditioning:
    """The conditioning of B texts, not yet evaluated. Warns of what is cut from a long one.

    T5's padding is neither masked nor left out, because FLUX was trained so; without `t5_padding` texts
    are only padded to the longest of them. clip_texts: B texts for CLIP, where it is to read others than T5.
    """
    warn_of_cuts(texts, t5_tokenizer, clip_tokenizer, clip_texts)
    features = t5(t5_tokenizer(list(texts), pad=t5_padding))  # (B, L, C)
    clip_tokens = clip_tokenizer(list(texts if clip_texts is None else clip_texts))
    pooled = clip(clip_tokens, clip_tokenizer.eos_token_id).pooled_output  # (B, D)
    return TextConditioning(features, pooled)


def warn_of_cuts(
    texts: Sequence[str],
    t5_tokenizer: T5Tokenizer,
    clip_tokenizer: CLIPTokenizer,
    clip_texts: Sequence[str] | None = None,
) -> None:
    """Warn of what `encode_texts` cuts from long texts."""
    for text in texts:
        warn_if_cut(text, t5_tokenizer, clip_tokenizer if clip_texts is None else None)
    for text in clip_texts or ():
        warn_if_cut(text, None, clip_tokenizer)


def warn_if_cut(text: str, t5_tokenizer: T5Tokenizer | None, clip_tokenizer: CLIPTokenizer | None) -> None:
    """Warn of the end of a text that does not fit; CLIP's only when T5, if it is given, reads all of it."""
    if t5_tokenizer and (cut := t5_tokenizer.truncated(text)):
        limit, rest = f"the model's {t5_tokenizer.max_length} tokens", "left out"
    elif clip_tokenizer and (cut := clip_tokenizer.truncated(text)):
        limit = f"CLIP's {clip_tokenizer.max_length} tokens"
        rest = "T5 reads all of it, CLIP's summary leaves out" if t5_tokenizer else "left out"
    else:
        return
    warnings.warn(f"the prompt is longer than {limit}; {rest}: {shown(cut)}", stacklevel=2)
