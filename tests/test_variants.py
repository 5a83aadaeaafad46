"""Models that are given pictures: told by channels and names, what they need, their place in the rest."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flux import FluxPipeline
from flux.adapters import Adapter, save
from flux.adapters.lora import linears
from flux.conditioning import ControlInput, Edit, Picture, variants
from flux.conditioning.encoder import PictureEncoder
from flux.encoding import encode_pictures
from flux.errors import FluxError
from flux.generation import generate
from flux.models.transformer import FluxParams
from flux.requests import Request
from flux.training.finetune.model import check_input
from flux.weights import checkpoints, fit, quantize, registry, shapes, specs, tensors
from flux.weights import save as models
from flux.weights.layouts import Part

from . import gguf_files, model_adapters, tiny
from .tiny_pipeline import make_parts, make_pipeline, write_checkpoint

RNG = np.random.default_rng(0)
PICTURE, OTHER = (Picture.from_array(RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8)) for _ in range(2))
MASK = Picture.from_array(np.pad(np.full((30, 20, 3), 255, np.uint8), ((10, 24), (20, 8), (0, 0))))
EDIT = Edit(PICTURE, mask=MASK)
SIZE = (64, 48)
GIVEN = {  # by row
    "fill": {"edit": EDIT},
    "canny": {"control": PICTURE},
    "kontext": {"references": (PICTURE, OTHER)},
}
SMALL = ((64, 48), (48, 64), (48, 48))  # in place of Kontext's sizes
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of each row in diffusers' layout, without this program's own defaults."""
    made = {}
    for row in ("dev", *GIVEN):
        made[row] = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a model", row=row)
        (made[row] / "defaults.json").unlink()
    return made


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch, request):
    if "published" not in request.node.name:
        monkeypatch.setattr(variants, "KONTEXT_SIZES", SMALL)


def draw(pipeline, **options) -> np.ndarray:
    options = {"seeds": (1,), "image_size": SIZE, "steps": 2, "guidance": 4.0} | options
    return np.stack(list(generate(pipeline, [Request("a red apple", **options)], keep_models=True)))


# --- Which model it is ---


def test_channels_of_the_published_models():
    assert fit.input_kind(64, 64, "x") == "text"
    assert fit.input_kind(384, 64, "x") == "fill"
    assert fit.input_kind(128, 64, "x") == "control"
    with pytest.raises(FluxError, match=r"x: Flex\.2: it wants"):
        fit.input_kind(196, 64, "x")
    with pytest.raises(FluxError, match="x: it takes 65 channels where it gives 64"):
        fit.input_kind(65, 64, "x")


@pytest.mark.parametrize(("name", "channels"), [("fill", 384), ("canny", 128)])
def test_names_and_shapes_of_the_published_models(name, channels, shared):
    """Fill and Canny have dev's tensors but for the first layer's inputs; Kontext has dev's."""
    theirs = json.loads((shared / f"reference/flux1-{name}-dev.bfl.json").read_text())
    dev = json.loads((REFERENCE / "flux1-dev.bfl.json").read_text())
    assert theirs == dev | {"img_in.weight": [3072, channels]}
    found = shapes.flux_params({k: mx.zeros(shape) for k, shape in theirs.items()}, {})
    assert found == FluxParams(in_channels=channels)


@pytest.mark.parametrize(
    ("file", "kind", "row"),
    [
        ("flux1-fill-dev_fp8", "fill", "fill"),
        ("FluxFusionFill-schnell", "fill", "fill"),
        ("flux1-canny-dev", "control", "canny"),
        ("fluxDepthDev", "control", "depth"),
        ("anything", "control", "canny"),
        ("flux1-dev-kontext_fp8_scaled", "text", "kontext"),
        ("flux1-fill-dev", "text", "dev"),  # its channels say otherwise
    ],
)
def test_rows_of_files(file, kind, row):
    found = registry.of_file(file, True, None, kind)
    assert found == registry.get(row)
    assert registry.of_file(file, False, None, kind).guidance == 0


def test_a_folder_says_its_row(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in folders:
            assert checkpoints.find(str(folders[row])).spec.name == row
            index = json.loads((folders[row] / "model_index.json").read_text())
            assert index["_class_name"] == registry.PIPELINES[registry.get(row).input]


def test_our_folder_keeps_the_input(tmp_path):
    """Also Kontext's, whose channels do not show it; a canny's defaults are kept."""
    for row in ("kontext", "canny"):
        spec = checkpoints.find(str(write_checkpoint(tmp_path / row, row=row))).spec
        assert (spec.name, spec.input, spec.steps) == (row, registry.get(row).input, 2)
    path = tmp_path / "kontext/model/defaults.json"
    path.write_text(path.read_text().replace('"reference"', '"video"'))
    with pytest.raises(FluxError, match="input should be one of text, fill, control, reference, not 'video'"):
        checkpoints.find(str(tmp_path / "kontext/model"))


def test_another_transformer_than_our_folders(folders, tmp_path):
    """The folder's defaults are not those of a transformer of another kind."""
    folder = write_checkpoint(tmp_path)
    fill = next((folders["fill"] / "transformer").glob("*.safetensors"))
    kontext = tmp_path / "my-kontext.safetensors"
    kontext.symlink_to(next((folders["dev"] / "transformer").glob("*.safetensors")))
    for file, row in ((fill, "fill"), (kontext, "kontext")):
        assert FluxPipeline(str(folder), transformer=str(file)).spec == registry.get(row)
    assert checkpoints.find(str(folder)).spec.steps == 2


def test_another_transformer_than_the_rows(folders, tmp_path):
    """Asked for by name: dev gives way to what the file is, and any other is refused."""

    def spec_of(asked: str, file: str, name: str = "x") -> registry.ModelSpec:
        path = next((folders[file] / "transformer").glob("*.safetensors"))
        (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
        (tmp_path / f"{name}.safetensors").symlink_to(path)
        part = Part("transformer", (tmp_path / f"{name}.safetensors",))
        return specs.spec_of(tmp_path, part, registry.get(asked), "repository")

    assert spec_of("dev", "fill") == registry.get("fill")
    assert spec_of("dev", "canny", "my-depth") == registry.get("depth")
    assert spec_of("dev", "dev", "kontext-Q8") == registry.get("kontext")
    assert spec_of("kontext", "dev") == registry.get("kontext")
    assert spec_of("depth", "canny") == registry.get("depth")
    with pytest.raises(FluxError, match=r"x\.safetensors: a model that is given text alone.*; fill needs"):
        spec_of("fill", "dev")
    with pytest.raises(FluxError, match=r"x\.safetensors: FLUX.1 Fill, by its channels; canny needs"):
        spec_of("canny", "fill")


@pytest.mark.parametrize("row", ["fill", "canny"])
@pytest.mark.parametrize("form", ["gguf", "pruned", "4 bits"])
def test_files_of_any_form(folders, tokenizers, tmp_path, row, form):
    """A GGUF with a quantized first layer, a file of 16 bits, and MLX's with every layer quantized."""
    parts = make_parts(tokenizers, row=row)
    weights = tiny.parameters(parts.flow)
    path = tmp_path / {"gguf": "x.gguf"}.get(form, "x.safetensors")
    if form == "gguf":
        packed = {name: ("F32", w.shape, np.array(w).tobytes()) for name, w in weights.items()}
        shape = weights["img_in.weight"].shape
        packed["img_in.weight"] = ("Q8_0", shape, gguf_files.blocks("Q8_0", shape, RNG))
        gguf_files.write(path, packed)
    elif form == "pruned":
        tensors.save(path, {name: w.astype(mx.float16) for name, w in weights.items()})
    else:
        nn.quantize(parts.flow, 64, 4, class_predicate=lambda _, m: _is_packable(m))
        models.save_network(path, "transformer", parts.flow, models.transformer_config(parts.flow.params))
    pipeline = FluxPipeline(str(folders["dev"]), dtype=mx.float32, transformer=str(path))
    assert (pipeline.spec.input, pipeline.spec.image_size) == (registry.get(row).input, (1024, 1024))
    assert draw(pipeline, **GIVEN[row]).std() > 5


def _is_packable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.weight.shape[1] % 64 == 0


# --- What it must be given ---


@pytest.mark.parametrize(
    ("row", "given", "line"),
    [
        ("fill", {}, "fill fills a part of a picture: --image PICTURE, and --mask"),
        ("fill", {"edit": Edit(PICTURE)}, "fill fills a part of a picture: --image PICTURE, and --mask"),
        ("canny", {}, "canny follows a control picture, .*: --control PICTURE"),
        ("depth", {"edit": EDIT}, "depth follows a control picture"),
        ("dev", {"references": (PICTURE,)}, r"dev takes no reference: .* needs Kontext \(--model kontext\)"),
        ("fill", {"edit": EDIT, "references": (PICTURE,)}, "fill takes no reference"),
        ("dev", {"control": PICTURE}, "dev takes no control picture: .* or a --controlnet"),
        ("kontext", {"references": (PICTURE,), "control": PICTURE}, "kontext takes no control picture"),
    ],
)
def test_what_is_missing_or_too_much(tokenizers, row, given, line):
    pipeline = make_pipeline(tokenizers, row=row)
    with pytest.raises(FluxError, match=line):
        Request("a", image_size=SIZE, **given).resolved(pipeline)


def test_kontext_without_a_picture_says_so(tokenizers):
    pipeline = make_pipeline(tokenizers, row="kontext")
    with pytest.warns(UserWarning, match=r"none is given to it \(--reference PICTURE\)"):
        text = draw(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipeline, edit=EDIT)
    assert np.array_equal(text, draw(make_pipeline(tokenizers, row="dev")))


def test_training_refuses_what_no_data_set_has():
    for row in ("fill", "depth"):
        with pytest.raises(FluxError, match=f"{row} is given a picture besides its text"):
            check_input(registry.get(row))
    with pytest.warns(UserWarning, match="kontext is trained without references"):
        check_input(registry.get("kontext"))


# --- Sizes and positions ---


def blank(height: int, width: int) -> Picture:
    return Picture.from_array(np.zeros((height, width, 3), np.uint8))


def test_published_sizes_of_references():
    for size, wanted in (
        ((768, 768), (1024, 1024)),
        ((3000, 4000), (880, 1184)),
        ((1080, 1920), (752, 1392)),
        ((100, 1000), (672, 1568)),
        ((900, 400), (1504, 688)),
    ):
        assert variants.reference_size(blank(*size)) == wanted
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in variants.KONTEXT_SIZES)
    assert len(set(variants.KONTEXT_SIZES)) == 17


def test_the_size_that_is_made(tokenizers):
    kontext, canny = (make_pipeline(tokenizers, row=row) for row in ("kontext", "canny"))
    for given, size in (
        ({"references": (blank(30, 40), blank(40, 30))}, (48, 64)),  # the first one's
        ({"references": (blank(30, 40),), "image_size": (32, 80)}, (32, 80)),
        ({"references": (blank(30, 40),), "edit": Edit(PICTURE)}, (64, 48)),
    ):
        assert Request("a", **given).resolved(kontext).image_size == size
    for shape, size in (((50, 70), (48, 64)), ((2000, 4000), (720, 1456)), ((5, 5), (16, 16))):
        assert Request("a", control=blank(*shape)).resolved(canny).image_size == size


def test_memory_is_checked_with_the_references(tokenizers, monkeypatch):
    counted = []
    pipeline = make_pipeline(tokenizers, row="kontext")
    monkeypatch.setattr(FluxPipeline, "check_memory", lambda self, size, steps, more: counted.append(more))
    Request("a", image_size=SIZE, references=(PICTURE, OTHER)).resolved(pipeline)
    assert counted == [2 * 4 * 3]


def test_positions_are_comfyuis():
    """By hand: 4x6 tokens, then 4x2 below (8 x 6 is less long than 4 x 8 would be wide), then 3x6 beside."""
    found = np.array(variants.reference_positions([(8, 12), (8, 4), (6, 12)]))[0]
    assert set(found[:, 0]) == {1}
    first, second, third = found[:24, 1:], found[24:32, 1:], found[32:, 1:]
    assert (first.min(0).tolist(), first.max(0).tolist()) == ([0, 0], [3, 5])
    assert (second.min(0).tolist(), second.max(0).tolist()) == ([4, 0], [7, 1])
    assert (third.min(0).tolist(), third.max(0).tolist()) == ([8, 0], [10, 5])


def test_a_squeezed_reference_is_said():
    encoder = PictureEncoder(lambda x: mx.zeros((1, x.shape[1] * x.shape[2] // 256, 64)), 8)
    with pytest.warns(UserWarning, match=r"is 40x100 \(height x width\); .* 48x64, squeezed"):
        encoder.references([blank(40, 100)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.references([blank(40, 60)])


# --- With the rest ---


@pytest.mark.parametrize("row", GIVEN)
def test_batches_guidance_and_freed_modulation(tokenizers, row):
    pipeline = make_pipeline(tokenizers, row=row)
    given = GIVEN[row] | {"cfg_scale": 2.0, "negative_prompt": "two green birds"}
    both = draw(pipeline, seeds=(1, 2), **given)
    assert np.array_equal(both[0], draw(pipeline, **given)[0])
    assert not np.array_equal(both[0], draw(pipeline, **GIVEN[row])[0])  # it guides
    request = Request("a red apple", (1, 2), image_size=SIZE, steps=2, guidance=4.0, **given)
    freed = list(generate(make_pipeline(tokenizers, row=row), [request], decoding_batch_size=2))
    assert np.abs(np.stack(freed).astype(int) - both).max() <= 1  # decoded together
    others = {"edit": Edit(OTHER, mask=MASK), "control": OTHER, "references": (OTHER, PICTURE)}
    other = draw(pipeline, **given | {name: others[name] for name in GIVEN[row]})
    assert np.abs(other.astype(int) - both[0]).mean() > 1


def test_fill_keeps_what_is_outside_the_mask(tokenizers):
    pipeline = make_pipeline(tokenizers, row="fill")
    made = draw(pipeline, edit=EDIT)[0]
    outside = MASK.pixels[..., 0] == 0
    assert np.array_equal(made[outside], PICTURE.pixels[outside])
    assert not np.array_equal(made[~outside], PICTURE.pixels[~outside])
    wide = draw(pipeline, edit=Edit(PICTURE, expand=(0, 16, 0, 16)))[0]
    assert np.array_equal(wide[:, 16:64], PICTURE.pixels)
    cropped = draw(pipeline, edit=replace(EDIT, crop_mask=4), image_size=(48, 48))[0]
    assert np.array_equal(cropped[outside], PICTURE.pixels[outside])
    assert np.array_equal(
        draw(pipeline, edit=replace(EDIT, strength=0.0))[0][outside], PICTURE.pixels[outside]
    )


def test_control_with_an_edit_and_edges(tokenizers, monkeypatch):
    pipeline = make_pipeline(tokenizers, row="canny")
    made = draw(pipeline, edit=EDIT, control=OTHER)[0]
    outside = MASK.pixels[..., 0] == 0
    assert np.array_equal(made[outside], PICTURE.pixels[outside])
    assert not np.array_equal(made, draw(pipeline, edit=EDIT, control=PICTURE)[0])
    monkeypatch.setattr("flux.conditioning.edges.opencv", lambda: None)
    monkeypatch.setattr("flux.conditioning.edges.canny", lambda pixels: 255 - pixels)
    edges = draw(pipeline, control=PICTURE, control_edges=True)
    assert np.array_equal(edges, draw(pipeline, control=Picture.from_array(255 - PICTURE.pixels)))


def test_no_picture_changes_a_dev(tokenizers):
    """The row's channels alone decide: PictureConditioning without pictures is none."""
    pipeline = make_pipeline(tokenizers)
    request = Request("a red apple", image_size=SIZE, steps=2).resolved(pipeline)
    assert not request.has_pictures
    assert all(part is None or part == () for part in encode_pictures(pipeline, request))


# --- Adapters ---


def control_file(folder: Path, channels: int = 128) -> Path:
    """As BFL's: low-rank changes, more channels, and norms that replace the model's."""
    shapes_of = model_adapters.FLOW | {"img_in": (model_adapters.HIDDEN, channels)}
    norms = {"double_blocks.0.img_attn.norm.query_norm.scale": mx.array(RNG.normal(1, 0.3, 32), mx.float32)}
    adapter = model_adapters.make(shapes_of)
    save(folder / "flux1-canny-dev-lora.safetensors", Adapter(adapter.modules, norms), "native")
    return folder / "flux1-canny-dev-lora.safetensors"


@pytest.mark.parametrize("bits", [None, 4])
def test_a_control_lora_makes_a_dev_take_a_control_picture(folders, tmp_path, bits):
    file = control_file(tmp_path)
    made = {}
    for fused in (False, True):
        pipeline = FluxPipeline(
            str(folders["dev"]), dtype=mx.float32, bits=bits, adapters=[(file, 0.8)], fuse_adapters=fused
        )
        assert (pipeline.spec.name, pipeline.spec.input, pipeline.spec.guidance) == ("dev", "control", 30.0)
        with pytest.raises(FluxError, match="dev follows a control picture"):
            Request("a", image_size=SIZE).resolved(pipeline)
        made[fused] = draw(pipeline, control=PICTURE)
        assert not np.array_equal(made[fused], draw(pipeline, control=OTHER))
    assert np.abs(made[False].astype(int) - made[True]).mean() < (1 if bits is None else 20)
    off = FluxPipeline(str(folders["dev"]), dtype=mx.float32, bits=bits, adapters=[(file, 0.0)])
    plain = FluxPipeline(str(folders["dev"]), dtype=mx.float32, bits=bits)
    assert np.abs(draw(off, control=PICTURE).astype(int) - draw(plain)).max() <= 1


def test_a_control_lora_with_others(folders, tmp_path):
    """In any order; one that changes img_in's first channels alone leaves the rest as they are."""
    control = control_file(tmp_path)
    style = model_adapters.write(tmp_path / "style.safetensors", {"img_in": (model_adapters.HIDDEN, 64)}, 3)
    for fused in (False, True):
        made = [
            draw(
                FluxPipeline(str(folders["dev"]), dtype=mx.float32, adapters=files, fuse_adapters=fused),
                control=PICTURE,
            )
            for files in ([(control, 1), (style, 1)], [(style, 1), (control, 1)], [(control, 1)])
        ]
        assert np.abs(made[0].astype(int) - made[1]).max() <= 1
        assert not np.array_equal(made[0], made[2])


def test_a_control_lora_over_a_packed_first_layer(tokenizers, folders, tmp_path):
    """Widened by columns of zeros, as a plain one."""
    parts = make_parts(tokenizers)
    nn.quantize(parts.flow, 64, 8, class_predicate=lambda path, _: path == "img_in")
    path = tmp_path / "x.safetensors"
    models.save_network(path, "transformer", parts.flow, models.transformer_config(parts.flow.params))
    file = control_file(tmp_path)
    made = [
        draw(
            FluxPipeline(str(folders["dev"]), dtype=mx.float32, adapters=[(file, 1)], **given),
            control=PICTURE,
        )
        for given in ({"transformer": str(path)}, {})
    ]
    assert np.abs(made[0].astype(int) - made[1]).mean() < 2


@pytest.mark.parametrize("row", ["fill", "canny", "kontext"])
def test_a_lora_of_dev_works_with_each(folders, tmp_path, row):
    file = model_adapters.write(tmp_path / "style.safetensors", model_adapters.FLOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipelines = [
            FluxPipeline(str(folders[row]), dtype=mx.float32, adapters=[(file, 1)], fuse_adapters=fused)
            for fused in (False, True)
        ]
    assert pipelines[0].spec == checkpoints.find(str(folders[row])).spec
    beside, fused = (draw(pipeline, **GIVEN[row]) for pipeline in pipelines)
    assert np.abs(beside.astype(int) - fused).max() <= 1
    assert not np.array_equal(beside, draw(FluxPipeline(str(folders[row]), dtype=mx.float32), **GIVEN[row]))


def test_a_control_lora_of_other_channels_is_refused(folders, tmp_path):
    file = control_file(tmp_path)
    with pytest.raises(FluxError, match="for 128 channels; the model takes 384: it goes with dev"):
        FluxPipeline(str(folders["fill"]), adapters=[(file, 1)])
    FluxPipeline(str(folders["canny"]), adapters=[(file, 1)])  # it has them already
    odd = control_file(tmp_path, 192)
    with pytest.raises(FluxError, match="takes 192 channels where it gives 64"):
        FluxPipeline(str(folders["dev"]), adapters=[(odd, 1)])


def test_a_controlnet_and_a_control_picture_are_told_apart(tokenizers):
    """A ControlNet's picture does not stand for the model's."""
    pipeline = make_pipeline(tokenizers, row="canny")
    with pytest.raises(FluxError, match="canny follows a control picture"):
        Request("a", image_size=SIZE, controlnets=(ControlInput(PICTURE),)).resolved(pipeline)


def test_quantized(tokenizers):
    """Blocks alone are packed: the layer that is given the pictures stays as it is."""
    for row in GIVEN:
        pipeline = make_pipeline(tokenizers, row=row)
        plain = draw(pipeline, **GIVEN[row])
        quantize.quantize(pipeline.flow, 8)
        assert isinstance(linears(pipeline.flow)["img_in"], nn.Linear)
        assert np.abs(draw(pipeline, **GIVEN[row]).astype(int) - plain).mean() < 10
