"""A small Florence-2 of transformers with random weights, its processor, and both as a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.captioning.tasks import NO_PHRASES
from flux.captioning.tokenizer import FLORENCE_TOKENS

HEIGHT, WIDTH = 96, 64  # of the pictures that it takes
VISION = {
    "depths": (1, 1, 2, 1),
    "embed_dim": (8, 16, 24, 32),
    "num_heads": (2, 2, 4, 4),
    "num_groups": (2, 4, 3, 8),
    "window_size": 3,
    "projection_dim": 40,
    "max_position_embeddings": 9,
    "max_temporal_embeddings": 5,
}
TEXT = {
    "d_model": 40,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 200,
}
GENERATION = {
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}
TEXTS = [
    "What does the image describe? Describe in detail what is shown in the image.",
    "A naïve café, 3,000 cats' dogs; we'll see. Locate the objects with category name: 猫の写真, фото, 😀.",
    "sks dog on a blue background, with a red apple\nand\tthe 42nd tree",
]


def bpe(letters: int = 256) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BART-like vocabulary and its merges, learned from TEXTS. letters: how many of the bytes it has."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(byte_level.alphabet())[:letters],
        limit_alphabet=letters,
        show_progress=False,
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.train_from_iterator(TEXTS, trainer)
    vocab = tokenizer.get_vocab()
    vocab["<mask>"] = len(vocab)
    model = json.loads(tokenizer.to_str())["model"]
    return vocab, [tuple(merge) for merge in model["merges"]]


def tokenizer(letters: int = 256):
    """transformers' BART tokenizer with Florence-2's tokens and the one that stands for a picture."""
    transformers = pytest.importorskip("transformers")
    vocab, merges = bpe(letters)
    reference = transformers.BartTokenizer(
        vocab=vocab,
        merges=merges,
        mask_token=transformers.AddedToken("<mask>", lstrip=True, normalized=False, special=True),
    )
    reference.add_tokens(list(FLORENCE_TOKENS), special_tokens=True)
    reference.add_special_tokens({"additional_special_tokens": ["<image>"]})
    reference.image_token = "<image>"
    reference.image_token_id = reference.convert_tokens_to_ids("<image>")
    return reference


def processor(reference_tokenizer):
    transformers = pytest.importorskip("transformers")
    images = transformers.CLIPImageProcessorPil(
        size={"height": HEIGHT, "width": WIDTH},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images.image_seq_length = 1 + (HEIGHT // 32) * (WIDTH // 32)
    plain = ("ocr", "pure_text", "description_with_bboxes", "bboxes", "polygons", "description_with_polygons")
    rules = {name: {} for name in (*plain, "description_with_bboxes_or_polygons")}
    rules["phrase_grounding"] = {"banned_grounding_tokens": sorted(NO_PHRASES)}
    return transformers.Florence2Processor(images, reference_tokenizer, post_processor_config=rules)


def network(vocab_size: int):
    """transformers' model, every weight and bias random, large enough that answers differ."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Florence2Config(
        vision_config=VISION,
        text_config={"model_type": "bart", "vocab_size": vocab_size, **TEXT},
        image_token_id=vocab_size - 1,
    )
    model = transformers.Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    return model


def save(folder: Path, model, reference_processor) -> Path:
    """The checkpoint as transformers writes it."""
    model.save_pretrained(folder)
    reference_processor.tokenizer.save_pretrained(folder)
    reference_processor.image_processor.save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    """Pictures of many sizes and shapes, some smooth, some noise."""
    random = np.random.default_rng(0)
    images = []
    for index in range(count):
        height, width = random.integers(3, 200, 2)
        small = random.integers(0, 256, (*random.integers(1, 9, 2), 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((int(width), int(height)), Image.Resampling.BILINEAR)
        if index % 3 == 0:
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images.append(image)
    return images
