"""FLUX.1 Redux against diffusers' FluxPriorReduxPipeline and FluxPipeline: the same files, the same noise."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image, ImageOps

from flux import FluxPipeline
from flux.conditioning import Picture, TextConditioning
from flux.conditioning.redux import Redux, appended, blended, opaque
from flux.models.redux import ReduxParams
from flux.models.siglip import SiglipParams
from flux.preprocessing import prepare
from flux.weights import redux as files
from flux.weights import shapes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from .test_pipeline import PROMPT, T5_LENGTH, networks, psnr, randomize, tokenizers  # noqa: E402

SIDE, PATCHES, TEXT = 101, 49, 48  # of SigLIP's pictures, 3 pixels more than their patches; the texts' width
OPTIONS = {"num_steps": 4, "guidance": 2.5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """diffusers' two pipelines, and the folders that they were saved in."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    folder = tmp_path_factory.mktemp("redux")
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
    )
    vision = {
        "image_encoder": randomize(transformers.SiglipVisionModel(config), 11),
        "image_embedder": randomize(ReduxImageEncoder(32, TEXT), 12),
        "feature_extractor": transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    }
    with torch.no_grad():  # so that 49 tokens beside the 64 of the text change the picture visibly
        vision["image_embedder"].redux_down.weight *= 4
    parts = networks(guidance=True) | tokenizers(folder / "vocabularies")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, **parts)
    diffusers.FluxPriorReduxPipeline(**vision).save_pretrained(folder / "redux")
    texts = {name: part for name, part in parts.items() if name.startswith(("text", "token"))}
    prior = diffusers.FluxPriorReduxPipeline(**vision, **texts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    spiece = folder / "vocabularies" / "tokenizer_2" / "spiece.model"
    (folder / "model" / "tokenizer_2" / "spiece.model").write_bytes(spiece.read_bytes())
    return prior, pipeline, folder


@pytest.fixture
def flux(reference):
    flux = FluxPipeline(str(reference[2] / "model"), dtype=mx.float32, redux=str(reference[2] / "redux"))
    flux.t5_tokenizer.max_length = T5_LENGTH
    return flux


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth, so that scaling it is not all rounding."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, bands), np.uint8)
    return Image.fromarray(noise.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)


A, B = picture(1, (80, 53)), picture(2, (40, 97))


def embedded(reference, given, prompt=PROMPT, **scales):
    """What diffusers' prior makes of pictures and a prompt of the length that quick tests have."""
    prior, pipeline, _ = reference
    text, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=T5_LENGTH)
    count = len(given) if isinstance(given, list) else 1
    embeds = {"prompt_embeds": text.repeat(count, 1, 1), "pooled_prompt_embeds": pooled.repeat(count, 1)}
    return prior(given, return_dict=False, **embeds, **scales)


def given(image: Image.Image) -> Picture:
    return Picture.from_array(np.array(image))


def error(found, expected):
    return np.linalg.norm(np.array(found) - expected) / np.linalg.norm(expected)


def theirs(pipeline, flux, seeds, size, embeds, pooled):
    noise = torch.from_numpy(np.array(flux.noise(seeds, (size[0] // 8, size[1] // 8))))
    made = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        guidance_scale=2.5,
        num_images_per_prompt=len(seeds),
        latents=noise,
        output_type="np",
    )
    return np.stack([(image * 255).round().astype(np.uint8) for image in made.images])


@pytest.mark.parametrize(("size", "pictures"), [((64, 64), 2), ((48, 112), 1), ((96, 64), 1)])
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_a_variation_is_diffusers(reference, flux, size, pictures, prompt):
    embeds, pooled = embedded(reference, A, prompt)
    seeds = range(5, 5 + pictures)
    expected = theirs(reference[1], flux, seeds, size, embeds, pooled)
    options = {"n_images": pictures, "seed": 5, "image_size": size, **OPTIONS}
    made = flux.generate_images(prompt, redux=[(given(A), 1.0)], **options)
    assert made.shape == expected.shape
    assert made.std() > 10
    assert all(psnr(a, b) >= 60 for a, b in zip(made, expected, strict=True))
    for other in ([], [(given(B), 1.0)], [(given(A), 0.5)]):
        assert psnr(flux.generate_images(prompt, redux=other, **options), expected) < 50


def test_a_blend_is_diffusers(reference, flux):
    """Which adds up embeddings, of text and picture, each picture's with its scale."""
    scales = [0.75, 0.5]
    options = {"prompt_embeds_scale": scales, "pooled_prompt_embeds_scale": scales}
    embeds, pooled = embedded(reference, [A, B], **options)
    expected = theirs(reference[1], flux, [7, 8], (64, 80), embeds, pooled)
    pairs = list(zip(map(given, (A, B)), scales, strict=True))
    options = {"n_images": 2, "seed": 7, "image_size": (64, 80), **OPTIONS}
    made = flux.generate_images(PROMPT, redux=pairs, redux_blend=True, **options)
    assert psnr(made, expected) >= 60
    assert psnr(flux.generate_images(PROMPT, redux=pairs, **options), expected) < 50


def test_several_pictures_stand_one_after_the_other(reference, flux):
    """Against diffusers' transformer, given such a text; its own pipeline has no such thing."""
    first, pooled = embedded(reference, A)
    second, _ = embedded(reference, B)
    tokens = flux.redux.siglip.params.tokens
    assert tokens == PATCHES
    embeds = torch.cat([first[:, :-tokens], 0.5 * first[:, -tokens:], 0.9 * second[:, -tokens:]], dim=1)
    expected = theirs(reference[1], flux, [3], (64, 64), embeds, pooled)
    pairs = [(given(A), 0.5), (given(B), 0.9)]
    made = flux.generate_images(PROMPT, seed=3, image_size=(64, 64), redux=pairs, **OPTIONS)
    assert psnr(made, expected) >= 60
    turned = flux.generate_images(PROMPT, seed=3, image_size=(64, 64), redux=pairs[::-1], **OPTIONS)
    assert psnr(turned, expected) >= 60  # all stand at position 0: their order does not count


@pytest.mark.parametrize("scales", [[1.0], [0.6], [0.6, 0.3]])
def test_embeddings_without_text_encoders_are_diffusers(reference, scales):
    """Which takes zeros as the text then: a scale is one of the pictures alone."""
    folder = reference[2] / "redux"
    prior = diffusers.FluxPriorReduxPipeline.from_pretrained(folder)
    prior.image_embedder.float()
    network = Redux.load(str(folder), dtype=mx.float32)
    pairs = [(network(given(image)), scale) for image, scale in zip((A, B), scales, strict=False)]
    expected = prior.image_embedder(prior.encode_image([A, B][: len(scales)], "cpu", 1)).image_embeds
    expected = (torch.tensor(scales)[:, None, None] * expected).sum(0, keepdim=True).detach().numpy()
    text = TextConditioning(mx.zeros((1, 6, TEXT)), mx.ones((1, 3)))
    assert error(blended(text, pairs).t5[:, 6:], expected) <= 1e-5
    assert mx.allclose(blended(text, pairs).clip, sum(scales) * text.clip)
    one_by_one = appended(text, pairs)
    assert one_by_one.t5.shape == (1, 6 + PATCHES * len(scales), TEXT)
    assert error(mx.unflatten(one_by_one.t5[:, 6:], 1, (-1, PATCHES)).sum(axis=1), expected) <= 1e-5
    assert mx.array_equal(one_by_one.clip, text.clip)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(45, 45), (64, 31), (9, 200), (1, 1)])
def test_preprocessing_is_transformers(mode, size, tmp_path):
    """From a file of any mode; transparency over white, as in transformers from version 5 on."""
    image = picture(3, size, mode) if mode in ("RGB", "L", "RGBA", "CMYK") else picture(3, size).convert(mode)
    if mode == "LA":
        image.putalpha(picture(4, size, "L"))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    processor = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    expected = processor(image, return_tensors="np", do_convert_rgb=True)["pixel_values"]
    params = files.PictureParams(SIDE, SIDE, files.SIGLIP_PICTURES.mean, files.SIGLIP_PICTURES.deviation)
    found = prepare([opaque(Picture.read(path))], params)
    assert np.array_equal(np.array(found), np.array(expected).transpose(0, 2, 3, 1))


def test_preprocessing_of_photos_is_transformers(shared):
    """Of any size, as their EXIF turns them."""
    processor = transformers.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    photos = sorted((shared / "data" / "dog6").glob("*.jp*g"))
    assert photos
    for path in photos:
        image = ImageOps.exif_transpose(Image.open(path))
        expected = processor(image, return_tensors="np", do_convert_rgb=True)["pixel_values"]
        found = prepare([opaque(Picture.read(path))], files.SIGLIP_PICTURES)
        assert np.array_equal(np.array(found), np.array(expected).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_names_and_shapes_at_full_size(prefix):
    """Of so400m-patch14-384 and FLUX.1-Redux-dev, from the reference's classes without memory.

    prefix: what google's, ComfyUI's and BFL's files write before SigLIP's names, and transformers 5 does not.
    """
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    config = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    with torch.device("meta"):
        siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
        projector = ReduxImageEncoder()
    theirs = {
        "siglip": {prefix + name: mx.zeros(tuple(p.shape)) for name, p in siglip.named_parameters()},
        "redux": {name: mx.zeros(tuple(p.shape)) for name, p in projector.named_parameters()},
    }
    whole = {"logit_scale": mx.zeros(1), "text_model.head.weight": mx.zeros((1, 1))}
    theirs["siglip"] |= whole  # of a whole SigLIP, which has a text encoder
    for kind, usual in (("siglip", SiglipParams()), ("redux", ReduxParams())):
        weights = files.to_ours(kind, theirs[kind])
        params = shapes.params(kind, weights, config if kind == "siglip" else {})
        assert params == usual == shapes.params(kind, weights, {})
        ours = dict(tree_flatten(files.NETWORKS[kind](params).parameters()))
        assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in weights.items()}
    assert usual.redux_dim == SiglipParams().hidden_size
    assert SiglipParams().tokens == 729
    assert prefix + "head.probe" in theirs["siglip"]
