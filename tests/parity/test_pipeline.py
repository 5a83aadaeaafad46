"""The whole pipeline against diffusers' FluxPipeline: the same checkpoint, the same noise, 4 steps.

The checkpoint is made of diffusers' and transformers' own classes with random weights, and written by
`save_pretrained`.
"""

import copy
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline, images, sampler
from flux.weights import save

from .. import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT, NEGATIVE = "a red apple on a blue background", "two green birds"
T5_LENGTH = 64  # quicker than the models' own 256 and 512, with which one test runs


def randomize(module, seed):
    """Random weights that keep activations near 1; norms' weights are not 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
    return module.eval()


def networks(guidance: bool) -> dict:
    clip = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=512,
        eos_token_id=513,
    )
    t5 = transformers.T5Config(
        vocab_size=128,
        d_model=48,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    made = {
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(8, 12, 12),
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 24, 24),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": transformers.CLIPTextModel(clip),
        "text_encoder_2": transformers.T5EncoderModel(t5),
    }
    return {name: randomize(module, seed) for seed, (name, module) in enumerate(made.items())}


def tokenizers(folder) -> dict:
    """transformers' tokenizers with the small vocabularies that tests/tiny.py writes."""
    clip, t5 = tiny.write_tokenizers(folder)
    pieces = tiny.sentencepiece.SentencePieceProcessor(model_file=str(t5 / "spiece.model"))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    return {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(clip, model_max_length=77),
        "tokenizer_2": transformers.T5TokenizerFast(vocab=vocab, extra_ids=0),
    }


@pytest.fixture(scope="module", params=["schnell", "dev"])
def checkpoint(request, tmp_path_factory):
    """diffusers' pipeline of one kind, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp(request.param)
    is_dev = request.param == "dev"
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=is_dev, shift=3.0 if is_dev else 1.0
        ),
        **networks(guidance=is_dev),
        **tokenizers(folder / "vocabularies"),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    # As in FLUX's repositories; transformers 5 saves a tokenizer.json alone.
    spiece = folder / "vocabularies" / "tokenizer_2" / "spiece.model"
    (folder / "model" / "tokenizer_2" / "spiece.model").write_bytes(spiece.read_bytes())
    return pipeline, folder / "model"


def load(folder, **options) -> FluxPipeline:
    flux = FluxPipeline(str(folder), dtype=mx.float32, **options)
    flux.t5_tokenizer.max_length = T5_LENGTH
    return flux


def theirs(pipeline, noise, size, t5_length=T5_LENGTH, **options):
    given = {"latents": torch.from_numpy(np.array(noise)), "num_images_per_prompt": len(noise)}
    return theirs_of(pipeline, size, t5_length=t5_length, **given, **options)


def theirs_of(pipeline, size, t5_length=T5_LENGTH, **options):
    height, width = (8 * side for side in size)
    made = pipeline(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=4,
        max_sequence_length=t5_length,
        output_type="np",
        **options,
    )
    return np.stack([(picture * 255).round().astype(np.uint8) for picture in made.images])


def ours(flux, noise, size, negative=None, guidance=3.5, cfg_scale=1.0):
    conditioning = flux.encode(PROMPT, negative, cfg_scale)
    *_, x = flux.denoise(flux.prepare(conditioning, noise, size, 4, guidance, cfg_scale))
    return images.to_uint8(flux.decode(x, size))


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize(("size", "pictures"), [((8, 8), 1), ((8, 14), 2)])
def test_pictures_are_diffusers(checkpoint, size, pictures):
    reference, folder = checkpoint
    flux = load(folder)
    noise = flux.noise(range(5, 5 + pictures), size)
    expected = theirs(reference, noise, size, guidance_scale=2.5)
    made = ours(flux, noise, size, guidance=2.5)
    assert made.shape == expected.shape
    assert made.std() > 10  # a picture, not a flat field that any program would match
    assert psnr(made, expected) >= 60


@pytest.mark.parametrize("size", [(8, 8), (6, 14)])
def test_a_torch_seed_gives_diffusers_picture(checkpoint, size):
    """One generator a picture, as diffusers takes for pictures that do not depend on their batch."""
    reference, folder = checkpoint
    seeds = [0, 123456789012345]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    expected = theirs_of(reference, size, generator=generators, num_images_per_prompt=2, guidance_scale=3.5)
    options = {"image_size": (8 * size[0], 8 * size[1]), "num_steps": 4, "guidance": 3.5}
    for seed, picture in zip(seeds, expected, strict=True):
        made = load(folder, noise="torch").generate_images(PROMPT, seed=seed, **options)[0]
        assert psnr(made, picture) >= 60
        assert psnr(load(folder).generate_images(PROMPT, seed=seed, **options)[0], picture) < 30


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 40), ("float16", 50)])
def test_pictures_in_16_bits_are_diffusers_with_its_rounding(checkpoint, dtype, least):
    """Of time and guidance, and of the noise; without, a dev is another function of both (20 dB)."""
    reference, folder = checkpoint
    rounded = copy.deepcopy(reference).to(getattr(torch, dtype))
    generator = torch.Generator("cpu").manual_seed(3)
    expected = theirs_of(rounded, (8, 8), generator=generator, guidance_scale=3.5)[0]
    for rounding in ("diffusers", "none"):
        options = {"noise": "diffusers", "rounding": rounding, "dtype": getattr(mx, dtype)}
        flux = FluxPipeline(str(folder), **options)
        flux.t5_tokenizer.max_length = T5_LENGTH
        made = flux.generate_images(PROMPT, seed=3, image_size=(64, 64), num_steps=4, guidance=3.5)[0]
        assert (psnr(made, expected) >= least) is (rounding == "diffusers" or dtype == "float16")


def comfyuis(pipeline, factor, steps, size, seed, guidance):
    """ComfyUI's way with diffusers' networks: its noise, times, texts and T5's 256 tokens; Euler by hand."""
    table = (
        torch.arange(1, 1001) / 1000
        if factor is None
        else factor / (factor + (1 / (torch.arange(1, 10001) / 10000) - 1))
    )
    sigmas = [table[-1 - int(i * len(table) / steps)] for i in range(steps)] + [torch.tensor(0.0)]
    h, w = size
    x = torch.randn((1, 16, h, w), generator=torch.manual_seed(seed))
    x = pipeline._pack_latents(x, 1, 16, h, w)
    text, pooled, text_ids = pipeline.encode_prompt(NEGATIVE, PROMPT, max_sequence_length=256)
    ids = pipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", torch.float32)
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": text_ids, "img_ids": ids}
    if pipeline.transformer.config.guidance_embeds:
        given["guidance"] = torch.tensor([guidance])
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            v = pipeline.transformer(hidden_states=x, timestep=sigma[None], return_dict=False, **given)[0]
            x = x + (following - sigma) * v
        x = pipeline._unpack_latents(x, 8 * h, 8 * w, 8) / 0.3611 + 0.1159
        picture = pipeline.vae.decode(x, return_dict=False)[0]
    return ((picture[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("size", "steps"), [((8, 8), 4), ((6, 14), 7)])
def test_a_comfyui_seed_gives_its_picture(checkpoint, size, steps):
    """simple's times, of dev shifted by the same in any size; T5's and CLIP's texts apart."""
    reference, folder = checkpoint
    is_dev = reference.transformer.config.guidance_embeds
    expected = comfyuis(reference, math.exp(1.15) if is_dev else None, steps, size, 42, 2.5)
    flux = FluxPipeline(str(folder), dtype=mx.float32, noise="torch", t5_padding=256, rounding="comfyui")
    options = {"seed": 42, "image_size": (8 * size[0], 8 * size[1]), "num_steps": steps, "guidance": 2.5}
    made = flux.generate_images(PROMPT, **options, schedule="simple", clip_prompt=NEGATIVE)[0]
    assert psnr(made, expected) >= 60
    for change in ({"schedule": "normal"}, {"clip_prompt": None}):
        assert (
            psnr(
                flux.generate_images(
                    PROMPT, **options, **{"schedule": "simple", "clip_prompt": NEGATIVE} | change
                )[0],
                expected,
            )
            < 55
        )


def test_true_guidance_is_diffusers(checkpoint):
    reference, folder = checkpoint
    flux = load(folder)
    noise = flux.noise([9], (8, 8))
    expected = theirs(reference, noise, (8, 8), negative_prompt=NEGATIVE, true_cfg_scale=3.0)
    made = ours(flux, noise, (8, 8), NEGATIVE, cfg_scale=3.0)
    assert psnr(made, expected) >= 60
    assert psnr(made, ours(flux, noise, (8, 8))) < 40  # it does lead away


def test_the_api_is_diffusers(checkpoint):
    """generate_latents as documented, with the model's own defaults."""
    reference, folder = checkpoint
    flux = FluxPipeline(str(folder), dtype=mx.float32)
    *_, x = flux.generate_latents(PROMPT, num_steps=4, latent_size=(8, 8), seed=3)
    noise = sampler.pack(sampler.noise([3], (8, 8), 16))
    expected = theirs(reference, noise, (8, 8), flux.spec.t5_length, guidance_scale=flux.spec.guidance)
    assert psnr(images.to_uint8(flux.decode(x, (8, 8))), expected) >= 60


def test_the_same_in_bfls_layout_gives_the_same_picture_to_the_bit(checkpoint, tmp_path):
    _, folder = checkpoint
    flux = load(folder)
    model = save.Model(
        flux.flow, flux.ae, flux.clip, flux.t5, folder / "tokenizer", folder / "tokenizer_2", flux.spec
    )
    save.save_bfl(tmp_path / "bfl", model)
    assert (tmp_path / "bfl" / "ae.safetensors").is_file()
    rewritten = load(tmp_path / "bfl")
    noise = flux.noise([4], (8, 12))
    assert np.array_equal(ours(rewritten, noise, (8, 12)), ours(flux, noise, (8, 12)))
