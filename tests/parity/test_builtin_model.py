"""The built-in model is a real checkpoint: diffusers loads its folder and makes the same picture."""

import mlx.core as mx
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from flux import FluxPipeline, images
from flux.weights.registry import TINY_FOLDER

from .test_pipeline import psnr

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT = "a small rocket on the left of a black background"


def test_diffusers_makes_the_same_picture_of_it():
    flux = FluxPipeline("tiny", dtype=mx.float32)
    size = flux.latent_size(flux.spec.image_size)
    noise = flux.noise([3], size)
    plan = flux.prepare(flux.encode(PROMPT, "", 3.0), noise, size, 8, guidance=1.0, cfg_scale=3.0)
    *_, x = flux.denoise(plan)
    made = images.to_uint8(flux.decode(x, size))[0]

    # Without protobuf transformers cannot read spiece.model itself.
    pieces = SentencePieceProcessor(model_file=str(TINY_FOLDER / "tokenizer_2" / "spiece.model"))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    theirs = diffusers.FluxPipeline.from_pretrained(
        TINY_FOLDER,
        dtype=torch.float32,
        tokenizer_2=transformers.T5TokenizerFast(vocab=vocab, extra_ids=0),
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT,
        negative_prompt="",
        true_cfg_scale=3.0,
        guidance_scale=1.0,
        latents=torch.from_numpy(np.array(noise)),
        height=flux.spec.image_size[0],
        width=flux.spec.image_size[1],
        num_inference_steps=8,
        max_sequence_length=flux.spec.t5_length,
        output_type="np",
    ).images[0]
    assert psnr(made, (expected * 255).round().astype(np.uint8)) >= 60
