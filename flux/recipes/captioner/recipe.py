"""The shape of the built-in captioner and its vocabulary: what training, export and evaluation share."""

import math
from pathlib import Path

from flux.captioning.tasks import TASKS
from flux.captioning.tokenizer import BartTokenizer
from flux.models.florence2 import Florence2Params, GenerationParams, LanguageParams, VisionParams
from flux.preprocessing import PictureParams
from flux.recipes.emoji import COLOURS, PAIR, PLACES, SIDE, SIZES, Composition, captions, subjects
from flux.training.vocabularies import save_bart, train_bart

SUBJECTS = 205  # the first so many of the table, as in the built-in generator; the vocabulary has all
CAPTION_TASKS = ("caption", "detailed", "more_detailed")
TASK_SHARES = (0.5, 0.25, 0.25)  # of the training pictures
ANSWER_LENGTH = 20  # tokens with start and end; the longest caption has so many
PICTURES = PictureParams(SIDE, SIDE)
GENERATION = GenerationParams(num_beams=1, max_new_tokens=32, no_repeat_ngram_size=0, early_stopping=False)
VISION = VisionParams(
    depths=(1, 1),
    # Patches that touch and do not overlap are plain matrix products, forwards and backwards.
    patch_size=(8, 2),
    patch_stride=(8, 2),
    patch_padding=(0, 0),
    patch_prenorm=(False, True),
    embed_dim=(96, 192),
    num_heads=(4, 8),
    num_groups=(4, 8),
    window_size=4,
    mlp_ratio=2.0,
)

STRIDE = math.prod(VISION.patch_stride)  # pixels; of the vision tower as a whole


def params(tokenizer: BartTokenizer) -> Florence2Params:
    """The captioner's shape, with an embedding for every token."""
    vocab_size = max(tokenizer.special.values()) + 1
    language = LanguageParams(
        vocab_size=vocab_size,
        d_model=128,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=64,
    )
    return Florence2Params(
        VISION, language, max_position_embeddings=SIDE // STRIDE, max_temporal_embeddings=1
    )


def answers(composition: Composition) -> list[str]:
    """What the three tasks say about a picture, the shortest first."""
    texts = captions(composition)
    return [texts[0], texts[-2], texts[-1]]


def texts() -> list[str]:
    """Every word of every caption, in captions of all kinds, and the tasks' prompts."""
    names = list(subjects())
    pairs = zip(names, names[1:] + names[:1], strict=True)
    shown = [Composition(pair, colour, "small", PAIR) for pair in pairs for colour in COLOURS]
    shown += [
        Composition((name,), "red", size, place) for name in names for size in SIZES for place in PLACES
    ]
    return [TASKS[task].ask() for task in CAPTION_TASKS] + [text for c in shown for text in captions(c)]


def load_tokenizer(folder: Path) -> BartTokenizer:
    """The captioner's vocabulary, learned and written if it is not there yet: every word is one token."""
    if not (folder / "tokenizer.json").exists():
        save_bart(*train_bart(texts()), folder)
    return BartTokenizer.from_folder(folder)
