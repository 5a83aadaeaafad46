"""ControlNets: files that are read or named, inputs that go with them, and their place among the rest."""

import json
import re
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save_file

from flux import FluxPipeline
from flux.adapters import read_weighted
from flux.conditioning import ControlInput, ControlNets, Edit, Guide, Picture, edges
from flux.conditioning.controlnets import NO_CONTROLNETS
from flux.errors import FluxError
from flux.generation import generate
from flux.models.controlnet import spread
from flux.models.nag import Nag
from flux.requests import Request
from flux.weights import checkpoints, repositories

from . import controlnets, gguf_files, tiny
from .tiny_pipeline import make_pipeline, write_checkpoint

SIZE = (48, 64)
LAYERS = ("in_layer", "out_layer")
PICTURE = Picture.from_array(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


def pipeline_with(tokenizers, *networks) -> FluxPipeline:
    pipeline = make_pipeline(tokenizers)
    pipeline.controlnets = ControlNets(networks)
    return pipeline


def draw(pipeline, *inputs, **options) -> np.ndarray:
    options = {"seeds": (1,), "image_size": SIZE, "steps": 3} | options
    request = Request("a red apple", controlnets=inputs, **options)
    return np.stack(list(generate(pipeline, [request], keep_models=True)))


# --- Files ---


@pytest.mark.parametrize("kind", controlnets.OURS)
@pytest.mark.parametrize("diffusers", [True, False])
def test_both_layouts_give_the_same_network(tmp_path, kind, diffusers):
    network = controlnets.make(kind)
    path = controlnets.write_ours(tmp_path / "any name.safetensors", network, diffusers)
    # Axes that no config tells are FLUX's; the tiny model has others.
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": list(network.params.axes_dim)}))
    for name in (path, tmp_path):
        read = checkpoints.load_part(checkpoints.find_controlnet(str(name)), mx.float32)
        assert read.params == network.params
        assert tiny.same(read, network)


def test_a_prefix_before_the_names(tmp_path):
    network = controlnets.make("single")
    weights = mx.load(str(controlnets.write_ours(tmp_path / "plain.safetensors", network)))
    named = {f"controlnet.{name}": np.array(w) for name, w in weights.items()}
    save_file(named, tmp_path / "prefixed.safetensors")
    part = checkpoints.find_controlnet(str(tmp_path / "prefixed.safetensors"))
    assert tiny.same(checkpoints.load_part(part, mx.float32), network)


def test_fp8_is_widened(tmp_path):
    """What ComfyUI's converters write."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    path = controlnets.write_ours(tmp_path / "wide.safetensors", controlnets.make("single"))
    narrow = {name: w.to(torch.float8_e4m3fn) for name, w in load_file(path).items()}
    save_torch(narrow, tmp_path / "fp8.safetensors")
    part = checkpoints.find_controlnet(str(tmp_path / "fp8.safetensors"))
    weight = tiny.parameters(checkpoints.load_part(part, mx.float32))["pos_embed_input.weight"]
    expected = narrow["controlnet_x_embedder.weight"].float().numpy()
    assert np.array_equal(np.array(weight), expected)


def test_gguf_stays_in_few_bits(tmp_path):
    gguf = pytest.importorskip("gguf")
    network = controlnets.make("union")
    weights = mx.load(str(controlnets.write_ours(tmp_path / "wide.safetensors", network, diffusers=False)))
    packed = {}
    for name, w in weights.items():
        dtype = "Q8_0" if "_blocks." in name and w.ndim == 2 else "F32"
        raw = gguf.quantize(np.array(w), gguf.GGMLQuantizationType[dtype])
        packed[name] = (dtype, tuple(w.shape), raw.tobytes())
    part = checkpoints.find_controlnet(str(gguf_files.write(tmp_path / "c.gguf", packed)))
    read = checkpoints.load_part(part, mx.float32)
    layers = [m for _, m in read.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert len(layers) == sum(dtype == "Q8_0" for dtype, *_ in packed.values())
    ours, theirs = (tiny.parameters(net)["controlnet_mode_embedder.weight"] for net in (read, network))
    assert mx.array_equal(ours, theirs)


def test_xlabs_names(tmp_path):
    """Those of BFL's layout, as XLabs' x-flux and ComfyUI write them."""
    names = mx.load(str(controlnets.write_ours(tmp_path / "x.safetensors", controlnets.make("xlabs"), False)))
    modules = {name.rpartition(".")[0] for name in names}
    assert {name for name in modules if not name.startswith("double_blocks.")} == {
        *(f"input_hint_block.{i}" for i in range(0, 16, 2)),
        *(f"{name}.{layer}" for name in ("time_in", "vector_in", "guidance_in") for layer in LAYERS),
        *("pos_embed_input", "img_in", "txt_in", "controlnet_blocks.0", "controlnet_blocks.1"),
    }
    assert names["input_hint_block.0.weight"].shape == (16, 3, 3, 3)
    assert names["input_hint_block.4.weight"].shape == (16, 16, 3, 3)


def test_what_is_no_controlnet_is_named(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    lora = {f"transformer_blocks.0.attn.to_q.lora_{x}.weight": np.zeros((4, 4), np.float32) for x in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    names = ("controlnet_blocks.0.weight", "pos_embed.proj.weight")
    save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "sd3.safetensors")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "else.safetensors")
    cases = {
        model / "transformer": "holds no ControlNet, but a transformer",
        tmp_path / "lora.safetensors": "an adapter (give it with --adapter), no ControlNet of FLUX.1",
        tmp_path / "sd3.safetensors": "a ControlNet of Stable Diffusion 3, not of FLUX.1",
        tmp_path / "else.safetensors": "holds no ControlNet, but nothing that is known here",
        tmp_path / "gone.safetensors": "no such file (for the ControlNet), nor a folder with one",
    }
    for path, line in cases.items():
        with pytest.raises(FluxError, match=re.escape(line)):
            checkpoints.find_controlnet(str(path))


def test_a_controlnet_is_no_model_and_no_adapter(tmp_path):
    path = controlnets.write_ours(tmp_path / "c.safetensors", controlnets.make("single"))
    with pytest.raises(FluxError, match=r"a ControlNet \(give it with --controlnet\)"):
        checkpoints.find(str(path))
    with pytest.raises(FluxError, match=r"c\.safetensors: a ControlNet \(give it .*\), no adapter"):
        read_weighted([(path, 1.0)])


def test_of_several_files_one_must_be_named(tmp_path):
    for name in ("a", "b"):
        controlnets.write_ours(tmp_path / f"{name}.safetensors", controlnets.make("xlabs"))
    with pytest.raises(FluxError, match=r"a\.safetensors, b\.safetensors there; choose a file with"):
        checkpoints.find_controlnet(str(tmp_path))


def test_missing_and_unexpected_tensors_are_one_line(tmp_path):
    weights = mx.load(str(controlnets.write_ours(tmp_path / "c.safetensors", controlnets.make("single"))))
    bad = {name: np.array(w) for name, w in weights.items() if name != "controlnet_blocks.1.bias"}
    bad["controlnet_new.weight"] = np.zeros(1, np.float32)
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(FluxError) as error:
        checkpoints.load_part(checkpoints.find_controlnet(str(tmp_path / "bad.safetensors")))
    assert "missing: controlnet_blocks.1.bias; unexpected: controlnet_new.weight" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_downloaded_of_a_repository():
    patterns = repositories.controlnet_patterns
    union = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "images/a.safetensors"]
    assert patterns("InstantX/Union", union)[0] == "diffusion_pytorch_model.safetensors"
    both = [*union, "diffusion_pytorch_model.fp8.safetensors"]
    assert patterns("a/b", both)[:-2] == ["diffusion_pytorch_model.safetensors"]
    assert patterns("XLabs-AI/canny", ["flux-canny.safetensors"])[0] == "flux-canny.safetensors"
    two = ["a.safetensors", "b.safetensors"]
    for files, found in ((two, "a.safetensors, b.safetensors"), ([], "no ControlNet")):
        with pytest.raises(FluxError, match=f"{found}.*choose a file with --controlnet a/b:FILE"):
            patterns("a/b", files)


# --- Fit ---


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("single", {"hidden_size": 128, "num_heads": 4}, "a hidden size of 128, not 64"),
        ("single", {"vec_in_dim": 16}, "CLIP vectors as wide as 16, not 32"),
        ("single", {"context_in_dim": 16}, "T5 vectors as wide as 16, not 48"),
        ("single", {"in_channels": 16}, "a latent's channels, packed: 16, not 64"),
        ("single", {"control_channels": 68}, "a control picture's channels, packed: 68, not 64"),
        ("single", {"depth": 3}, "3 double and 1 single blocks, more than the model's 2 and 3"),
    ],
)
def test_a_controlnet_of_another_model_is_named(tokenizers, kind, changes, line):
    pipeline = make_pipeline(tokenizers)
    part = checkpoints.Part("controlnet", ("c.safetensors",))
    nets = ControlNets((controlnets.make(kind, **changes),), (part,))
    with pytest.raises(FluxError, match=re.escape(f"c.safetensors does not fit this model: it has {line}")):
        nets.check_fit(pipeline.flow, pipeline.ae)


# --- Inputs ---


@pytest.mark.parametrize(
    ("kind", "given", "line"),
    [
        ("union", {}, "this ControlNet is a union: it needs the control picture's mode, canny, tile"),
        ("single", {"mode": "canny"}, "this ControlNet takes no mode: leave out 'canny'"),
        ("union", {"mode": "cany"}, "this ControlNet has no mode 'cany', but canny, tile, depth, blur, pose"),
        ("union", {"mode": 5}, "this ControlNet has no mode 5, but"),
        ("union", {"mode": "gray"}, "this ControlNet has no mode 'gray', but"),
        ("union", {"mode": -1}, "this ControlNet has no mode -1, but"),
        ("single", {"strength": float("nan")}, "strength must be a finite number, not nan"),
        ("single", {"strength": float("inf")}, "strength must be a finite number, not inf"),
        ("single", {"start": 0.6, "end": 0.5}, "0 <= start <= end <= 1, not 0.6 and 0.5"),
        ("single", {"start": float("nan")}, "0 <= start <= end <= 1, not nan and 1.0"),
        ("single", {"end": 1.5}, "0 <= start <= end <= 1, not 0.0 and 1.5"),
    ],
)
def test_bad_inputs_are_named(tokenizers, kind, given, line):
    pipeline = pipeline_with(tokenizers, controlnets.make(kind))
    with pytest.raises(FluxError, match=re.escape(line)):
        draw(pipeline, ControlInput(PICTURE, **given))


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_pictures_as_controlnets(tokenizers, count):
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    line = rf"1 ControlNet\(s\) and {count} control picture\(s\): give one for each"
    with pytest.raises(FluxError, match=line):
        draw(pipeline, *[ControlInput(PICTURE)] * count)


def test_a_mode_by_name_is_its_number(tokenizers):
    pipeline = pipeline_with(tokenizers, controlnets.make("union"))
    by_name, by_number, other = (draw(pipeline, ControlInput(PICTURE, m)) for m in ("depth", 2, "pose"))
    assert np.array_equal(by_name, by_number)
    assert not np.array_equal(by_name, other)


# --- Among the rest ---


def test_strength_0_and_no_steps_are_no_controlnet(tokenizers):
    plain = draw(make_pipeline(tokenizers))
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    assert not np.array_equal(draw(pipeline, ControlInput(PICTURE)), plain)
    for given in ({"strength": 0.0}, {"start": 0.5, "end": 0.5}):
        assert np.array_equal(draw(pipeline, ControlInput(PICTURE, **given)), plain)


def test_two_of_half_the_strength_are_one(tokenizers):
    network = controlnets.make("single")
    one = draw(pipeline_with(tokenizers, network), ControlInput(PICTURE, strength=1.0))
    two = draw(pipeline_with(tokenizers, network, network), *[ControlInput(PICTURE, strength=0.5)] * 2)
    assert np.abs(one.astype(int) - two).max() <= 1


def test_kinds_side_by_side_in_any_order(tokenizers):
    """Residuals of single blocks of one alone, repeated ones of the other: each by its rule."""
    nets = [controlnets.make("xlabs", 1), controlnets.make("union", 2)]
    inputs = [ControlInput(PICTURE), ControlInput(PICTURE, "tile")]
    one = draw(pipeline_with(tokenizers, *nets), *inputs)
    two = draw(pipeline_with(tokenizers, *nets[::-1]), *inputs[::-1])
    assert np.abs(one.astype(int) - two).max() <= 1


def test_freed_modulation_and_batches_change_nothing(tokenizers):
    given = ControlInput(PICTURE, 1)
    expected = draw(pipeline_with(tokenizers, controlnets.make("union")), given, seeds=(4, 5))
    pipeline = pipeline_with(tokenizers, controlnets.make("union"))
    network = pipeline.controlnets.networks[0]
    request = Request("a red apple", (4, 5), image_size=SIZE, steps=3, controlnets=(given,))
    made = np.stack(list(generate(pipeline, [request], decoding_batch_size=2, keep_models=False)))
    assert np.array_equal(made, expected)
    assert "time_in" not in network
    assert not hasattr(pipeline, "controlnets")


def test_true_guidance_and_a_picture_that_is_changed(tokenizers):
    """Both passes of a step have the residuals; a step that is not made has none."""
    given = ControlInput(PICTURE)
    options = {"negative_prompt": "birds", "cfg_scale": 2.0}
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    assert not np.array_equal(draw(pipeline, given, **options), draw(make_pipeline(tokenizers), **options))
    options = {"edit": Edit(PICTURE, strength=0.5)}
    assert not np.array_equal(draw(pipeline, given, **options), draw(make_pipeline(tokenizers), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": "birds", "nag": Nag(5.0)},
        {"negative_prompt": "birds", "cfg_scale": 2.0, "cfg_end": 0.5},
        {"guide": Guide(lambda x, t: (x**2).mean(), strength=0.5)},
        {"solver": "heun"},
    ],
)
def test_beside_what_else_leads_a_picture(tokenizers, options):
    """Both have an effect: neither the one nor the other alone gives the picture."""
    pipeline, plain = pipeline_with(tokenizers, controlnets.make("single")), make_pipeline(tokenizers)
    given = ControlInput(PICTURE)
    both = draw(pipeline, given, **options)
    assert not np.array_equal(both, draw(plain, **options))
    assert not np.array_equal(both, draw(pipeline, given))


def test_a_picture_that_is_not_to_be_changed_needs_no_step(tokenizers):
    options = {"edit": Edit(PICTURE, strength=0.0)}
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    given = ControlInput(PICTURE)
    assert np.array_equal(draw(pipeline, given, **options), draw(make_pipeline(tokenizers), **options))


def test_a_control_picture_lies_over_the_whole_picture_that_is_changed(tokenizers):
    """Where a part of it is worked on, the ControlNet is told that part: what is outside does not matter."""
    mask = np.zeros((96, 96, 3), np.uint8)
    mask[40:56, 40:56] = 255
    photo = Picture.from_array(np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    edit = Edit(photo, mask=Picture.from_array(mask), crop_mask=8)
    inside, outside = photo.pixels.copy(), photo.pixels.copy()
    inside[44:52, 44:52] = 0
    outside[:20] = 0
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    expected, same, other = (
        draw(pipeline, ControlInput(Picture.from_array(pixels)), edit=edit, image_size=(48, 48))
        for pixels in (photo.pixels, outside, inside)
    )
    assert np.array_equal(expected, same)
    assert not np.array_equal(expected, other)


def test_of_the_control_pictures_aspect_where_no_size_is_given(tokenizers):
    pipeline = pipeline_with(tokenizers, controlnets.make("single"))
    assert draw(pipeline, ControlInput(PICTURE), image_size=None, steps=1).shape == (1, 64, 96, 3)  # of 60x90


def test_files_quantized_with_the_model(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    network = controlnets.make("single")
    path = controlnets.write_ours(tmp_path / "c.safetensors", network)
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": list(network.params.axes_dim)}))
    wide = FluxPipeline(str(model), controlnets=[str(path)])
    narrow = FluxPipeline(str(model), controlnets=[str(path)], bits=8)
    layers = [m for _, m in narrow.controlnets.networks[0].named_modules()]
    assert sum(isinstance(m, nn.QuantizedLinear) for m in layers) > 10
    assert not any(isinstance(m, nn.QuantizedLinear) for _, m in wide.controlnets.networks[0].named_modules())
    a, b = draw(wide, ControlInput(PICTURE)), draw(narrow, ControlInput(PICTURE))
    assert 0 < np.abs(a.astype(int) - b).mean() < 10
    assert wide.fingerprints().keys() >= {f"ControlNet {path}"}


def test_spread():
    """FLUX.1's 19 double blocks: as in diffusers' transformer, and as XLabs repeats."""
    numbers = [mx.array(i) for i in range(6)]
    in_a_row = [r.item() for r in spread(numbers, 19, repeat=False)]
    assert in_a_row == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3
    assert [r.item() for r in spread(numbers[:2], 19, repeat=True)] == [0, 1] * 9 + [0]
    assert spread([], 38, repeat=False) == []


def test_none_add_nothing(tokenizers):
    flow = make_pipeline(tokenizers).flow.params
    assert NO_CONTROLNETS.residuals((), flow, mx.zeros((1, 4, 64)), 0) is None


# --- Edges ---


def test_edges_need_opencv_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(FluxError, match="not installed: `pip install -r requirements-control"):
        replace(ControlInput(PICTURE), edges=True).check()


def test_edges():
    pytest.importorskip("cv2")
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = (255, 0, 128)
    found = edges.canny(pixels)
    assert found.shape == pixels.shape
    assert set(np.unique(found)) == {0, 255}
    assert found[12:28, 18:22].any()
    assert not found[15:25, 25:35].any()
