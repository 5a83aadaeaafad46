"""Quantization: the right layers, near the original, and files that load ready-quantized to the bit."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from flux.errors import FluxError
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.pipeline import FluxPipeline
from flux.weights import checkpoints, quantize, save
from tests import tiny

T5 = replace(tiny.T5, d_model=64, d_ff=96)


def network(kind: str) -> nn.Module:
    built = Flux(tiny.FLUX) if kind == "transformer" else T5Encoder(T5)
    return tiny.randomize(built, 3)


def quantized_layers(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.QuantizedLinear)}


def test_layers_of_the_transformer():
    flux = quantize.quantize(network("transformer"))
    linear = {name for name, layer in network("transformer").named_modules() if isinstance(layer, nn.Linear)}
    assert quantized_layers(flux) == {name for name in linear if name.startswith(("double_", "single_"))}
    assert "double_blocks.1.img_mlp.2" in quantized_layers(flux)
    assert "single_blocks.2.modulation.lin" in quantized_layers(flux)


def test_layers_that_do_not_divide_stay():
    """T5 of 64, feed-forward 96: groups of 64 leave `wo` and `o` (input 32) alone, groups of 32 do not."""
    by_64 = quantized_layers(quantize.quantize(network("t5"), group_size=64))
    by_32 = quantized_layers(quantize.quantize(network("t5"), group_size=32))
    assert {name.rpartition(".")[2] for name in by_64} == {"q", "k", "v", "wi_0", "wi_1"}
    assert {name.rpartition(".")[2] for name in by_32 - by_64} == {"o", "wo"}


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_weights_are_near(bits, error):
    flux, whole = quantize.quantize(network("transformer"), bits), network("transformer")
    layer, original = flux.double_blocks[0].img_attn.qkv, whole.double_blocks[0].img_attn.qkv
    widened = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=bits)
    distance = mx.linalg.norm(widened - original.weight) / mx.linalg.norm(original.weight)
    assert 0 < distance.item() < error
    assert mx.array_equal(layer.bias, original.bias)


def test_the_network_still_runs():
    flux, whole = quantize.quantize(network("transformer"), 8), network("transformer")
    inputs = {
        "img": mx.random.normal((1, 6, 16), key=mx.random.key(0)),
        "img_ids": mx.zeros((1, 6, 3)),
        "txt": mx.random.normal((1, 5, 48), key=mx.random.key(1)),
        "txt_ids": mx.zeros((1, 5, 3)),
        "timesteps": mx.array([0.5]),
        "y": mx.random.normal((1, 32), key=mx.random.key(2)),
        "guidance": mx.array([3.5]),
    }
    a, b = flux(**inputs), whole(**inputs)
    assert mx.linalg.norm(a - b) / mx.linalg.norm(b) < 0.05


@pytest.mark.parametrize(("mode", "bits"), [(mode, bits) for bits, mode in quantize.KINDS.values()])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", ["transformer", "t5"])
def test_saved_and_loaded_to_the_bit(kind, dtype, mode, bits, tmp_path):
    original = network(kind)
    original.set_dtype(dtype)
    group = 16 if mode == "nvfp4" else 32
    quantize.quantize(original, bits, group, mode)
    config = save.transformer_config(tiny.FLUX) if kind == "transformer" else save.t5_config(T5)
    path = tmp_path / "q.safetensors"
    save.save_network(path, kind, original, config)
    loaded = checkpoints.load_part(checkpoints.Part(kind, (path,)), dtype)
    assert quantized_layers(loaded) == quantized_layers(original) != set()
    assert loaded.params == original.params
    assert tiny.same(loaded, original)
    layer = next(layer for _, layer in loaded.named_modules() if isinstance(layer, nn.QuantizedLinear))
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group, mode)


def test_a_whole_quantized_model(tmp_path):
    model = tiny.model(*tiny.write_tokenizers(tmp_path / "tokenizers"))
    quantize.quantize(model.flux, 4)
    quantize.quantize(model.t5, 8, group_size=32)
    save.save_bfl(tmp_path / "m", model)
    found = checkpoints.find(str(tmp_path / "m"))
    for kind, loaded in (("flux", found.load_flux(mx.float32)), ("t5", found.load_t5(mx.float32))):
        assert tiny.same(loaded, getattr(model, kind))
    with pytest.raises(FluxError, match="use save_bfl"):
        save.save_diffusers(tmp_path / "d", model)
    assert not (tmp_path / "d").exists()


def test_a_quantized_file_is_checked_too(tmp_path):
    flux = quantize.quantize(network("transformer"), 4)
    path = tmp_path / "q.safetensors"
    save.save_network(path, "transformer", flux, save.transformer_config(tiny.FLUX))
    content, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(content)
    del content["double_blocks.0.img_attn.qkv.biases"]
    mx.save_safetensors(str(path), content, metadata)
    with pytest.raises(FluxError, match=r"missing: double_blocks\.0\.img_attn\.qkv\.biases$"):
        checkpoints.load_part(checkpoints.Part("transformer", (path,)))
    for nonsense in ("{", '{"bits": 99}', "[]"):
        mx.save_safetensors(str(path), content, metadata | {"quantization": nonsense})
        with pytest.raises(FluxError, match=r"q\.safetensors"):
            checkpoints.load_part(checkpoints.Part("transformer", (path,)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2,), "to 2 bits"),
        ((16,), "to 16 bits"),
        ((4, 48), "groups of 48: choose 64 or 32 or 128"),
        ((8, 32, "mxfp4"), "to 8 bits"),
        ((4, 64, "mxfp4"), "groups of 64: choose 32"),
        ((4, 64, "nf4"), "'nf4': choose one of 3, 4, 5, 6, 8, mxfp4"),
    ],
)
def test_refused(arguments, words):
    with pytest.raises(FluxError, match=words):
        quantize.quantize(network("transformer"), *arguments)


# --- What became of the layers ---


def test_narrow_layers_take_a_smaller_group():
    """T5 of 64, feed-forward 96: `o` and `wo` (32 and 96 wide) are in groups of 32, the rest of 64."""
    t5 = quantize.quantize(network("t5"), 8)
    layers = {name: m for name, m in t5.named_modules() if isinstance(m, nn.QuantizedLinear)}
    groups = {name.rpartition(".")[2]: layer.group_size for name, layer in layers.items()}
    assert groups == {"q": 64, "k": 64, "v": 64, "wi_0": 64, "wi_1": 64, "o": 32, "wo": 32}
    assert quantize.report(8, T5=t5) == (
        "T5 14 of 14 layers, 10 in 8 bits in groups of 64, 4 in 8 bits in groups of 32"
    )


def test_the_report():
    flux = quantize.quantize(network("transformer"))
    left = sum(isinstance(m, nn.Linear) for _, m in network("transformer").named_modules())
    count = len(quantized_layers(flux))
    assert 0 < count < left
    assert quantize.report(4, transformer=flux, T5=network("t5")) == (
        f"transformer {count} of {left} layers, 4 bits in groups of 64; T5 0 of 14 layers"
    )


def test_nothing_is_said():
    narrow = tiny.randomize(T5Encoder(replace(tiny.T5, d_model=48, d_ff=80, d_kv=8)), 3)
    with pytest.warns(
        UserWarning, match="nothing was quantized: no layer's input is a multiple of a group wide"
    ):
        assert quantize.report(4, T5=quantize.quantize(narrow)) == "T5 0 of 14 layers"


def test_layers_of_other_bits_are_said():
    flux = network("transformer")
    nn.quantize(flux, 32, 8, class_predicate=lambda path, _: path == "double_blocks.0.img_mlp.0")
    with pytest.warns(UserWarning, match="1 layers stay as their file has them, not in 4"):
        assert "1 in 8 bits in groups of 32" in quantize.report(4, transformer=quantize.quantize(flux))


def test_two_sizes_of_groups_in_one_file(tmp_path):
    t5 = quantize.quantize(network("t5"))
    path = tmp_path / "f.safetensors"
    save.save_network(path, "t5", t5, save.t5_config(T5))
    assert tiny.same(checkpoints.load_part(checkpoints.Part("t5", (path,)), mx.float32), t5)


def test_different_bits_in_one_file(tmp_path):
    """As of a GGUF file of mixed types: the bits of each layer follow from its shapes."""
    flux = network("transformer")
    four = lambda path, _: path.startswith("single_blocks.0")  # noqa: E731
    nn.quantize(flux, 32, 4, class_predicate=lambda path, m: isinstance(m, nn.Linear) and four(path, m))
    quantize.quantize(flux, 8, 32)
    path = tmp_path / "f.safetensors"
    save.save_network(path, "transformer", flux, save.transformer_config(tiny.FLUX))
    assert tiny.same(checkpoints.load_part(checkpoints.Part("transformer", (path,)), mx.float32), flux)


# --- The program ---


def test_a_model_is_written_quantized_and_makes_the_same_picture(tmp_path):
    """As --quantize makes it: of weights that are in bfloat16 in both."""
    run = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    python = (sys.executable, "-m", "flux.weights", "quantize", "tiny")
    done = run([*python, str(tmp_path / "q8"), "--bits", "8", "--t5-bits", "mxfp4"])
    assert (done.returncode, done.stderr.count("quantized")) == (0, 0), done.stderr
    assert re.search(r"transformer \d+ of \d+ layers, .*8 bits in groups of 64", done.stderr)
    assert re.search(r"T5 14 of 14 layers, mxfp4 in groups of 32", done.stderr)
    ours = FluxPipeline("tiny", dtype=mx.bfloat16)
    quantize.quantize(ours.flow, 8)
    quantize.quantize(ours.t5, 4, mode="mxfp4")
    found = FluxPipeline(str(tmp_path / "q8"), dtype=mx.bfloat16)
    assert tiny.same(found.flow, ours.flow)
    assert tiny.same(found.t5, ours.t5)
    assert replace(found.spec, repo="", file="") == ours.spec
    assert run([*python, str(tmp_path), "--bits", "4"]).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q8"]
