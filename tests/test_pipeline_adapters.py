"""Adapters in FluxPipeline: beside and in the weights, several, quantized, in every network."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux import FluxPipeline, images
from flux.adapters import Adapter, Delta, LowRank, save
from flux.adapters.beside import AdaptedLinear
from flux.adapters.lora import linears
from flux.errors import FluxError

from . import tiny, tiny_pipeline
from .model_adapters import CLIP, FLOW, MODULATION, T5, make, write

SIZE = (8, 6)
PROMPT = "a red apple on a blue background"
ALL = {**FLOW, **MODULATION, **CLIP, **T5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_pipeline.write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("adapters") / "all.safetensors", ALL)


def latents(flux: FluxPipeline, **options) -> mx.array:
    generated = flux.generate_latents(PROMPT, 2, num_steps=2, latent_size=SIZE, seed=5, **options)
    next(generated)
    return list(generated)[-1]


def distance(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def psnr(flux: FluxPipeline, a: mx.array, b: mx.array) -> float:
    a, b = (images.to_uint8(flux.decode(x, SIZE)).astype(float) for x in (a, b))
    return 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9))


@pytest.fixture(scope="module")
def base(model) -> mx.array:
    return latents(FluxPipeline(model))


def wrapped(flux: FluxPipeline) -> set[str]:
    networks = (flux.flow, flux.clip, flux.t5)
    return {n for net in networks for n, layer in linears(net).items() if isinstance(layer, AdaptedLinear)}


@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_beside_is_fused(model, file, base, strength):
    beside = FluxPipeline(model, adapters=[(file, strength)])
    fused = FluxPipeline(model, adapters=[(file, strength)], fuse_adapters=True)
    assert wrapped(beside) == set(ALL)
    assert wrapped(fused) == set()
    a, b = latents(beside), latents(fused)
    assert distance(a, b) < 1e-4
    assert psnr(beside, a, b) > 60
    assert distance(a, base) > 0.05


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_strength_0_is_the_base_to_the_bit(model, file, fuse, bits):
    flux = FluxPipeline(model, bits=bits, adapters=[(file, 0)], fuse_adapters=fuse)
    assert mx.array_equal(latents(flux), latents(FluxPipeline(model, bits=bits)))


@pytest.mark.parametrize("fuse", [False, True])
def test_two_adapters_add_up(model, tmp_path, fuse):
    """Two of rank 3 are one of rank 6, also where only one of them changes a layer."""
    first, second = make({**FLOW, **CLIP}, seed=1), make({**FLOW, **T5}, seed=2)
    both = {}
    for name in first.modules | second.modules:
        changes = [(a.modules[name].change, s) for a, s in ((first, 0.5), (second, 0.7)) if name in a.modules]
        down = mx.concatenate([c.down for c, _ in changes])
        up = mx.concatenate([s * c.scale * c.up for c, s in changes], axis=1)
        both[name] = Delta(LowRank(down, up, float(len(down))))
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, adapter in zip(files, (first, second, Adapter(both)), strict=True):
        save(path, adapter, "native")
    two = FluxPipeline(model, adapters=[(files[0], 0.5), (str(files[1]), 0.7)], fuse_adapters=fuse)
    expected = latents(FluxPipeline(model, adapters=[(files[2], 1)]))
    assert distance(latents(two), expected) < 1e-4
    assert distance(latents(FluxPipeline(model, adapters=[(files[0], 0.5)])), expected) > 0.05


def test_quantized(model, file, base):
    """Beside quantized weights the adapter keeps all its digits; fused, it is rounded with them."""
    adapters = [(file, 1)]
    beside = FluxPipeline(model, bits=8, adapters=adapters)
    fused = FluxPipeline(model, bits=8, adapters=adapters, fuse_adapters=True)
    qkv = linears(beside.flow)["double_blocks.0.img_attn.qkv"]
    assert isinstance(qkv, AdaptedLinear)
    assert isinstance(qkv.base, nn.QuantizedLinear)
    assert isinstance(linears(fused.flow)["double_blocks.0.img_attn.qkv"], nn.QuantizedLinear)
    assert wrapped(fused) == set()
    exact = latents(FluxPipeline(model, adapters=adapters))
    assert distance(exact, base) > 0.05
    for flux in (beside, fused):
        assert 0 < distance(latents(flux), exact) < 0.02


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_adapted_modulation_is_computed_once_and_let_go(model, tmp_path, base, fuse, dtype):
    path = write(tmp_path / "modulation.safetensors", MODULATION)
    flux = FluxPipeline(model, dtype=dtype, adapters=[(path, 1)], fuse_adapters=fuse)
    assert flux.flow.dtype == dtype
    flux.flow.round_embeddings = False  # or the comparison in 16 bits would measure that
    kept = latents(flux)
    assert distance(kept, base) > 0.05
    assert mx.array_equal(latents(flux, keep_modulation=False), kept)
    assert not wrapped(flux)
    exact = latents(FluxPipeline(model, adapters=[(path, 1)]))
    assert distance(kept, exact) < (1e-4 if dtype == mx.float32 else 0.05)


@pytest.mark.parametrize(("part", "shapes"), [("clip", CLIP), ("t5", T5)])
def test_text_encoders_get_their_share(model, tmp_path, part, shapes):
    path = write(tmp_path / "text.safetensors", shapes)
    plain, adapted = FluxPipeline(model), FluxPipeline(model, adapters=[(path, 1)])
    assert wrapped(adapted) == set(shapes)
    a, b = plain.encode(PROMPT).positive, adapted.encode(PROMPT).positive
    for name in ("clip", "t5"):
        same = mx.array_equal(getattr(a, name), getattr(b, name))
        assert same == (name != part)


def test_16_bit_weights_keep_their_type(model, file):
    """Float32 adapters and norms do not widen the computation."""
    path = file.with_name("norms.safetensors")
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    save(path, Adapter(make(FLOW).modules, added={name: mx.ones(32)}), "native")
    for fuse in (False, True):
        flux = FluxPipeline(model, dtype=mx.bfloat16, adapters=[(file, 1), (path, 1)], fuse_adapters=fuse)
        assert flux.flow.dtype == mx.bfloat16
        assert {a.dtype for a in flux.encode(PROMPT).positive} == {mx.bfloat16}
        assert flux.flow.embed_text(mx.zeros((1, 2, 48))).dtype == mx.bfloat16
        assert mx.isfinite(latents(flux)).all()


def test_memory(model, tmp_path):
    """Beside the weights nothing is read at once; fusing before quantizing never holds the wide weights."""
    path = write(tmp_path / "flow.safetensors", {**FLOW, **MODULATION})
    whole = sum(w.nbytes for w in tiny.parameters(FluxPipeline(model, dtype=mx.float32).flow).values())
    mx.clear_cache()
    before = mx.get_active_memory()
    beside = FluxPipeline(model, dtype=mx.float32, adapters=[(path, 1)])
    assert mx.get_active_memory() - before < 0.05 * whole
    del beside
    mx.reset_peak_memory()
    fused = FluxPipeline(model, dtype=mx.float32, bits=4, adapters=[(path, 1)], fuse_adapters=True)
    mx.eval(fused.flow.parameters())
    assert mx.get_peak_memory() - before < 0.4 * whole  # 0.34; all layers at once 0.56, quantized later 0.45


def test_what_is_left_out_is_named_in_one_line(model, tmp_path, base):
    """An unexpected key, no such layer, another size: the rest is used."""
    strange = {**FLOW, "double_blocks.7.img_attn.qkv": (192, 64), "single_blocks.1.linear2": (10, 320)}
    path = write(
        tmp_path / "strange.safetensors", {**strange, "text_model.encoder.layers.5.mlp.fc1": (96, 32)}
    )
    mx.save_safetensors(str(path), {**mx.load(str(path)), "lora_unet_mid_block.alpha": mx.array(1.0)})
    with pytest.warns(UserWarning, match="left out of the adapter") as record:
        flux = FluxPipeline(model, adapters=[(path, 1)])
    (warning,) = (str(w.message) for w in record)
    assert warning.startswith(f"{path}: ")
    assert "\n" not in warning
    for name in (
        "lora_unet_mid_block.alpha: unexpected key",
        *(strange.keys() - FLOW.keys()),
        "layers.5.mlp.fc1",
    ):
        assert name in warning
    assert wrapped(flux) == set(FLOW)
    assert distance(latents(flux), base) > 0.05


def test_many_names_are_counted(model, tmp_path):
    blocks = {f"single_blocks.{i}.linear2": (64, 320) for i in range(38)}
    path = write(tmp_path / "dev.safetensors", blocks)
    with pytest.warns(UserWarning, match=r"and 15 more \(35 in all\); .*flux.adapters check .* names all"):
        FluxPipeline(model, adapters=[(path, 1)])


def test_nothing_fits(model, tmp_path):
    path = write(
        tmp_path / "big.safetensors",
        {
            "double_blocks.0.img_attn.qkv": (9216, 3072),
            **{"text_model.encoder.layers.0.mlp.fc1": (3072, 768)},
        },
    )
    with pytest.raises(FluxError, match=r"big\.safetensors: nothing .* fits .*qkv: .*3072 -> 9216.*mlp\.fc1"):
        FluxPipeline(model, adapters=[(path, 1)])


def test_an_adapter_is_read_before_the_model(tmp_path):
    with pytest.raises(FluxError, match=r"none\.safetensors: cannot be read"):
        FluxPipeline("no such model", adapters=[(tmp_path / "none.safetensors", 1)])
    with pytest.raises(FluxError, match=r"strength must be a finite number, not nan"):
        FluxPipeline("no such model", adapters=[("a.safetensors", float("nan"))])
