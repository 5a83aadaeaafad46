"""Fill, Canny or Depth, and Kontext against diffusers' pipelines: the same checkpoint, noise and pictures.

diffusers samples the autoencoder's latents of Fill's and of a control picture; here both take the means.
"""

import importlib
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from flux import FluxPipeline
from flux.adapters import Adapter, save
from flux.adapters import load as read
from flux.adapters.changes import Delta, LowRank
from flux.adapters.lora import linears
from flux.conditioning import Edit, Picture, variants

from .test_edits import cells, load, photo
from .test_pipeline import NEGATIVE, PROMPT, T5_LENGTH, networks, psnr, randomize, tokenizers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
PIL = pytest.importorskip("PIL.Image")

STEPS, SEEDS, GUIDANCE = 4, (7, 8), 12.0
SIZES = [(64, 64), (48, 112), (96, 64)]
EXTRA = {"Fill": 64 + 256, "Control": 64, "Kontext": 0}  # channels beside the noise's
SMALL = ((96, 48), (80, 64), (64, 64), (64, 80), (48, 96))  # in place of Kontext's sizes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each kind diffusers' pipeline and the folder that it was saved in; made when they are asked for."""
    pipelines = {}

    def make(kind):
        if kind not in pipelines:
            pipelines[kind] = write(kind, tmp_path_factory.mktemp(kind))
        return pipelines[kind]

    return make


def write(kind, folder):
    parts = networks(guidance=True)
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    config |= {"in_channels": 64 + EXTRA[kind], "out_channels": 64}
    parts["transformer"] = randomize(diffusers.FluxTransformer2DModel.from_config(config), 20)
    pipeline = getattr(diffusers, f"Flux{kind}Pipeline")(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        **parts,
        **tokenizers(folder / "vocabularies"),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "model")
    spiece = folder / "vocabularies" / "tokenizer_2" / "spiece.model"
    (folder / "model" / "tokenizer_2" / "spiece.model").write_bytes(spiece.read_bytes())
    return pipeline, folder / "model"


@pytest.fixture(autouse=True)
def means(monkeypatch):
    kind = importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mode())


def theirs(pipeline, flux, size, **given):
    noise = flux.noise(SEEDS, (size[0] // 8, size[1] // 8))
    out = pipeline(
        prompt=PROMPT,
        height=size[0],
        width=size[1],
        latents=torch.from_numpy(np.array(noise)),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=len(SEEDS),
        max_sequence_length=T5_LENGTH,
        output_type="np",
        **given,
    )
    return (out.images * 255).round().astype(np.uint8)


def ours(flux, size, **given):
    options = {"num_steps": STEPS, "guidance": GUIDANCE, "n_images": len(SEEDS), "seed": SEEDS[0]}
    return flux.generate_images(PROMPT, image_size=size, **options, **given)


def assert_same(made, expected):
    assert made.shape == expected.shape
    assert expected.std() > 10  # a picture, not a flat field that any program would match
    assert psnr(made, expected) >= 60


def test_the_folders_say_what_they_are(made):
    for kind, row, kind_of_input in (
        ("Fill", "fill", "fill"),
        ("Control", "canny", "control"),
        ("Kontext", "kontext", "reference"),
    ):
        spec = load(made(kind)[1]).spec
        assert (spec.name, spec.input) == (row, kind_of_input)


@pytest.mark.parametrize("size", SIZES)
def test_fill(made, size):
    reference, folder = made("Fill")
    flux, picture, mask = load(folder), photo(size), cells(size)
    mask[3:21, 5:37] = 255  # not in whole cells
    given = {"image": PIL.fromarray(picture), "mask_image": PIL.fromarray(mask)}
    expected = theirs(reference, flux, size, **given)
    edit = Edit(Picture.from_array(picture), mask=Picture.from_array(mask), keep=False)
    assert_same(ours(flux, size, edit=edit), expected)
    grey = Picture.from_array(np.where(mask, 130, 120).astype(np.uint8))  # black and white for Fill
    made_of_grey = ours(flux, size, edit=Edit(Picture.from_array(picture), mask=grey, keep=False))
    assert psnr(made_of_grey, expected) >= 60
    other = Edit(Picture.from_array(picture), mask=Picture.from_array(255 - mask), keep=False)
    assert psnr(ours(flux, size, edit=other), expected) < 40


def test_fill_from_a_strength_on(made):
    reference, folder = made("Fill")
    size = (64, 80)
    flux, picture, mask = load(folder), photo(size), cells(size)
    pipeline = type(reference)(**reference.components)
    pipeline.set_progress_bar_config(disable=True)
    noise = flux.noise(SEEDS, (8, 10))
    edit = Edit(Picture.from_array(picture), 0.5, Picture.from_array(mask), keep=False)
    start = flux.encode_picture(picture)
    t = flux.prepare(flux.encode(PROMPT), None, (8, 10), STEPS, GUIDANCE, strength=0.5).times[0]
    latents = torch.from_numpy(np.array((1 - t) * start + t * noise))
    out = pipeline(
        prompt=PROMPT,
        height=size[0],
        width=size[1],
        latents=latents,
        strength=0.5,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=2,
        max_sequence_length=T5_LENGTH,
        output_type="np",
        image=PIL.fromarray(picture),
        mask_image=PIL.fromarray(mask),
    )
    assert_same(ours(flux, size, edit=edit), (out.images * 255).round().astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_control(made, size):
    reference, folder = made("Control")
    flux, picture = load(folder), photo(size)
    expected = theirs(reference, flux, size, control_image=PIL.fromarray(picture))
    assert_same(ours(flux, size, control=Picture.from_array(picture)), expected)
    assert psnr(ours(flux, size, control=Picture.from_array(255 - picture)), expected) < 40


@pytest.mark.parametrize(("size", "scale"), [((64, 64), 1.0), ((48, 96), 2.5), ((80, 64), 1.0)])
def test_kontext(made, monkeypatch, size, scale):
    module = importlib.import_module("diffusers.pipelines.flux.pipeline_flux_kontext")
    monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", [(w, h) for h, w in SMALL])
    monkeypatch.setattr(variants, "KONTEXT_SIZES", SMALL)
    reference, folder = made("Kontext")
    flux, picture = load(folder), photo((70, 90))
    given = {"image": PIL.fromarray(picture), "max_area": math.prod(size), "true_cfg_scale": scale}
    expected = theirs(reference, flux, size, negative_prompt=NEGATIVE if scale > 1 else None, **given)
    guided = {"cfg_scale": scale, "negative_prompt": NEGATIVE if scale > 1 else None}
    assert_same(ours(flux, size, references=[Picture.from_array(picture)], **guided), expected)
    other = ours(flux, size, references=[Picture.from_array(255 - picture)], **guided)
    assert psnr(other, expected) < 40


def comfyuis_ids(sizes):
    """ComfyUI's positions of references, by its rule on sides in pixels of the latent."""
    h = w = 0
    ids = []
    for rows, columns in sizes:
        beside = rows + h > columns + w
        top, left = (0, w) if beside else (h, 0)
        h, w = max(h, rows + top), max(w, columns + left)
        grid = torch.ones(rows // 2, columns // 2, 3)
        grid[..., 1] = top // 2 + torch.arange(rows // 2)[:, None]
        grid[..., 2] = left // 2 + torch.arange(columns // 2)[None, :]
        ids.append(grid.reshape(-1, 3))
    return torch.cat(ids)


def test_several_references(made, monkeypatch):
    """ComfyUI's way with diffusers' networks: three pictures, one below and one beside the first."""
    monkeypatch.setattr(variants, "KONTEXT_SIZES", SMALL)
    reference, folder = made("Kontext")
    flux, size = load(folder), (64, 48)
    shapes = [(64, 80), (64, 64), (96, 48)]  # of SMALL, so that nothing is scaled
    pictures = [photo(shape) + i for i, shape in enumerate(shapes)]
    text, pooled, text_ids = reference.encode_prompt(PROMPT, max_sequence_length=T5_LENGTH)
    ids = [
        reference._prepare_latent_image_ids(1, 4, 3, "cpu", torch.float32),
        comfyuis_ids([(h // 8, w // 8) for h, w in shapes]),
    ]
    times = flux.prepare(flux.encode(PROMPT), None, (8, 6), STEPS, GUIDANCE).times
    x = torch.from_numpy(np.array(flux.noise(SEEDS[:1], (8, 6))))
    with torch.no_grad():
        tokens = []
        for (h, w), picture in zip(shapes, pictures, strict=True):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
            latent = (reference.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
            tokens.append(reference._pack_latents(latent, 1, 16, h // 8, w // 8))
        for t, following in itertools.pairwise(times):
            v = reference.transformer(
                hidden_states=torch.cat([x, *tokens], dim=1),
                timestep=torch.tensor([t]),
                guidance=torch.tensor([GUIDANCE]),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=torch.cat(ids),
                return_dict=False,
            )[0]
            x = x + (following - t) * v[:, : x.shape[1]]
        latent = reference._unpack_latents(x, 64, 48, 8) / 0.3611 + 0.1159
        picture = reference.vae.decode(latent, return_dict=False)[0]
    expected = ((picture[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    given = [Picture.from_array(picture) for picture in pictures]
    options = {"image_size": size, "num_steps": STEPS, "guidance": GUIDANCE, "seed": SEEDS[0]}
    assert_same(flux.generate_images(PROMPT, references=given, **options)[0], expected)
    assert psnr(flux.generate_images(PROMPT, references=given[::-1], **options)[0], expected) < 50


def control_lora(flux, rng) -> Adapter:
    """As BFL's: all layers, with biases, and norms that replace the model's."""
    modules = {}
    for name, layer in linears(flux.flow).items():
        rows, columns = layer.weight.shape
        columns = 2 * columns if name == "img_in" else columns
        down, up = (rng.standard_normal(s, dtype=np.float32) / 8 for s in ((4, columns), (rows, 4)))
        bias = mx.array(rng.standard_normal(rows, dtype=np.float32) / 8)
        modules[name] = Delta(LowRank(mx.array(down), mx.array(up), 4.0), bias)
    norms = {
        f"{stem}.norm.{norm}_norm.scale": mx.array(1 + rng.standard_normal(32, dtype=np.float32) / 4)
        for stem in ("double_blocks.0.img_attn", "double_blocks.1.txt_attn", "single_blocks.1")
        for norm in ("query", "key")
    }
    return Adapter(modules, norms)


@pytest.mark.parametrize(("size", "fused"), [(SIZES[0], False), (SIZES[1], False), (SIZES[2], True)])
def test_control_lora(made, tmp_path, size, fused):
    """On a dev, which then takes a control picture, as diffusers' load_lora_weights makes it."""
    reference, folder = made("Kontext")  # a dev's networks, by a name that does not say so
    adapter = control_lora(load(folder), np.random.default_rng(3))
    save(tmp_path / "flux1-depth-dev-lora.safetensors", adapter, "diffusers")
    parts = {name: part for name, part in reference.components.items() if part is not None}
    parts["transformer"] = type(reference.transformer).from_pretrained(folder / "transformer")
    pipeline = diffusers.FluxControlPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(tmp_path / "flux1-depth-dev-lora.safetensors"))
    path = tmp_path / "flux1-depth-dev-lora.safetensors"
    flux = FluxPipeline(str(folder), dtype=mx.float32, adapters=[(path, 1.0)], fuse_adapters=fused)
    flux.t5_tokenizer.max_length = T5_LENGTH
    assert (flux.spec.input, flux.spec.guidance, flux.flow.params.in_channels) == ("control", 10.0, 128)
    expected = theirs(pipeline, flux, size, control_image=PIL.fromarray(photo(size)))
    assert_same(ours(flux, size, control=Picture.from_array(photo(size))), expected)


def test_bfls_control_lora_file(tmp_path):
    """At full size: the names as diffusers reads them, every change and every bias."""
    utils = importlib.import_module("diffusers.loaders.lora_conversion_utils")
    rng, hidden, rank = np.random.default_rng(4), 3072, 2
    shapes = {
        "img_in": (hidden, 128),
        "txt_in": (hidden, 4096),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        shapes |= {f"{name}.in_layer": (hidden, columns), f"{name}.out_layer": (hidden, hidden)}
    for stem in (f"double_blocks.{i}.{stream}" for i in range(19) for stream in ("img", "txt")):
        shapes |= {f"{stem}_mod.lin": (6 * hidden, hidden), f"{stem}_attn.qkv": (3 * hidden, hidden)}
        shapes |= {f"{stem}_attn.proj": (hidden, hidden), f"{stem}_mlp.0": (4 * hidden, hidden)}
        shapes[f"{stem}_mlp.2"] = (hidden, 4 * hidden)
    for stem in (f"single_blocks.{i}" for i in range(38)):
        shapes |= {f"{stem}.modulation.lin": (3 * hidden, hidden), f"{stem}.linear1": (7 * hidden, hidden)}
        shapes[f"{stem}.linear2"] = (hidden, 5 * hidden)
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.lora_A.weight"] = rng.standard_normal((rank, columns), dtype=np.float32)
        state[f"{name}.lora_B.weight"] = rng.standard_normal((rows, rank), dtype=np.float32)
        state[f"{name}.lora_B.bias"] = rng.standard_normal(rows, dtype=np.float32)
    double = [f"double_blocks.{i}.{stream}_attn" for i in range(19) for stream in ("img", "txt")]
    for stem in (*double, *(f"single_blocks.{i}" for i in range(38))):
        for norm in ("query", "key"):
            state[f"{stem}.norm.{norm}_norm.scale"] = rng.standard_normal(128, dtype=np.float32)
    mx.save_safetensors(str(tmp_path / "bfl.safetensors"), {name: mx.array(w) for name, w in state.items()})
    adapter = read(tmp_path / "bfl.safetensors", strict=True)
    assert adapter.format == "control LoRA (BFL)"
    save(tmp_path / "ours.safetensors", adapter, "diffusers")
    ours = {name: np.array(w) for name, w in mx.load(str(tmp_path / "ours.safetensors")).items()}
    converted = utils._convert_bfl_flux_control_lora_to_diffusers(
        {name: torch.from_numpy(w) for name, w in state.items()}
    )
    theirs = {name: w.numpy() for name, w in converted.items()}
    assert ours.keys() == theirs.keys()
    x = {name: rng.standard_normal(w.shape[1], dtype=np.float32) for name, w in theirs.items() if w.ndim == 2}
    for name, w in theirs.items():
        if "norm_out" in name and w.ndim == 2:
            continue  # diffusers swaps the halves of A's rows, its ranks, as well
        if name.endswith("lora_B.weight"):
            down = name.replace("lora_B", "lora_A")
            mine, wanted = (s[name] @ (s[down] @ x[down]) for s in (ours, theirs))
            np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-3)
        elif w.ndim == 1:
            np.testing.assert_allclose(ours[name], w, rtol=1e-6)
