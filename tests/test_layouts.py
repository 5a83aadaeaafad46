"""Folders as people have them: parts found by what is in the files, strangers passed over and named."""

import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder
from flux.models.clip import CLIPTextModel
from flux.models.transformer import Flux
from flux.weights import checkpoints, keymaps, layouts, prefixes, save, strangers, tensors
from flux.weights import gguf as gguf_names
from tests import tiny
from tests.test_checkpoints import LOADERS, assert_is

# Where other programs keep the parts, and what they call the files.
TREES = {
    "flat": ("flux1-dev.safetensors", "ae.sft", "clip_l.safetensors", "t5xxl_fp16.safetensors"),
    "comfyui": (
        "models/diffusion_models/sub/mine.safetensors",
        "models/vae/ae.safetensors",
        "models/text_encoders/clip_l.safetensors",
        "models/text_encoders/t5xxl_fp16.safetensors",
    ),
    "forge": (
        "models/Stable-diffusion/flux1-dev.safetensors",
        "models/VAE/ae.safetensors",
        "models/text_encoder/clip_l.safetensors",
        "models/text_encoder/t5xxl_fp16.safetensors",
    ),
    "no names": ("a/b/1.safetensors", "a/b/2.sft", "c/3.safetensors", "4.safetensors"),
}
LORA = {"double_blocks.0.img_attn.qkv.lora_A.weight": mx.zeros((1, 64))}
SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": mx.zeros((4, 4)),
    "first_stage_model.decoder.conv_in.weight": mx.zeros((4, 4, 3, 3)),
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": mx.zeros((4, 4)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> save.Model:
    """Of a shape that tensors alone can tell: no config is needed."""
    whole = tiny.model(*tiny.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))
    flux = tiny.randomize(Flux(replace(tiny.FLUX, axes_dim=(4, 14, 14), vec_in_dim=64)), 8)
    params = replace(tiny.AE, ch=32, norm_groups=32, scale_factor=0.3611)
    ae = tiny.randomize(AutoEncoder(params), 9)
    clip = tiny.randomize(CLIPTextModel(replace(tiny.CLIP, hidden_size=64, num_attention_heads=1)), 10)
    return replace(whole, flux=flux, ae=ae, clip=clip)


def parts_of(model: save.Model) -> dict[str, dict[str, mx.array]]:
    """The parts' tensors as single files have them."""
    return {
        kind: keymaps.to_file(kind, tiny.parameters(network), diffusers=False)
        for kind, network in model.networks.items()
    }


def write(folder: Path, model: save.Model, files: tuple[str, ...] = TREES["flat"]) -> Path:
    for file, own in zip(files, parts_of(model).values(), strict=True):
        tensors.save(folder / file, own)
    return folder


def write_tokenizers(folder: Path, model: save.Model) -> None:
    shutil.copytree(model.clip_tokenizer, folder / "tokenizer")
    shutil.copytree(model.t5_tokenizer, folder / "tokenizer_2")


def all_in_one(model: save.Model) -> dict[str, mx.array]:
    """As ComfyUI writes it."""
    before = {"clip": "text_encoders.clip_l.transformer.", "t5": "text_encoders.t5xxl.transformer."}
    return {
        before.get(kind, prefixes.PREFIXES[kind][0]) + name: w
        for kind, own in parts_of(model).items()
        for name, w in own.items()
    }


def found(folder: Path, **files) -> tuple[checkpoints.Checkpoint, list[str]]:
    """The checkpoint, and the lines that finding it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = checkpoints.find(str(folder), **files)
    return checkpoint, [str(w.message) for w in caught]


@pytest.mark.parametrize("tree", TREES)
def test_trees(tree, model, tmp_path):
    checkpoint, lines = found(write(tmp_path, model, TREES[tree]))
    assert_is(checkpoint, model)
    assert lines == []
    assert checkpoint.clip_tokenizer == layouts.SHIPPED_TOKENIZERS / "tokenizer"
    assert checkpoint.load_clip_tokenizer().encode("a red apple")[:5] == [49406, 320, 736, 3055, 49407]
    assert checkpoint.load_t5_tokenizer(8).encode("a red apple") == [3, 9, 1131, 8947, 1, 0, 0, 0]


def test_all_in_one(model, tmp_path):
    """As the model itself, alone in a folder, and from inside a tree."""
    for folder, file in ((tmp_path / "a", "all.safetensors"), (tmp_path / "b", "models/checkpoints/x.sft")):
        tensors.save(folder / file, all_in_one(model))
        for name in (folder, folder / file):
            checkpoint, lines = found(name)
            assert_is(checkpoint, model)
            assert {part.files for part in checkpoint.parts.values()} == {(folder / file,)}
            assert lines == []


@pytest.mark.parametrize("bare", ["transformer", "ae", "t5"])
def test_one_part_without_a_prefix_among_others_with(bare, model, tmp_path):
    before = {"transformer": "module.", "ae": "vae.", "clip": "text_encoder.", "t5": "text_encoder_2."}
    before[bare] = ""
    content = {before[kind] + name: w for kind, own in parts_of(model).items() for name, w in own.items()}
    tensors.save(tmp_path / "all.safetensors", content)
    checkpoint, lines = found(tmp_path / "all.safetensors")
    assert_is(checkpoint, model)
    assert lines == []


def test_a_file_takes_the_rest_from_its_tree(model, tmp_path):
    write(tmp_path, model, TREES["comfyui"])
    file = tmp_path / "models/diffusion_models/sub/mine.safetensors"
    file.rename(tmp_path / "models/diffusion_models/mine.safetensors")
    write_tokenizers(tmp_path / "models", model)
    checkpoint, _ = found(tmp_path / "models/diffusion_models/mine.safetensors")
    assert_is(checkpoint, model)
    assert checkpoint.load_clip_tokenizer().eos_token_id == 513


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("transformer", "model.diffusion_model."),
        ("transformer", "_orig_mod."),
        ("transformer", "module._orig_mod."),
        ("transformer", "transformer."),
        ("transformer", "model."),
        ("transformer", "ema."),  # the average, where there is nothing else
        ("ae", "module."),
        ("ae", "first_stage_model."),
        ("clip", "cond_stage_model.transformer."),
        ("clip", "model."),
        ("t5", "text_encoder_2._orig_mod."),
        ("t5", "t5xxl.transformer."),
    ],
)
def test_prefixes(kind, before, model, tmp_path):
    write(tmp_path, model)
    file = tmp_path / TREES["flat"][layouts.PARTS.index(kind)]
    tensors.save(file, {before + name: w for name, w in parts_of(model)[kind].items()})
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert lines == []


def test_foreign_tensors_are_named_once(model, tmp_path):
    """In the all-in-one file, and in files of one part without a prefix."""
    foreign = {
        "__index_timestep_zero__": mx.zeros(0),
        "text_encoders.clip_l.logit_scale": mx.zeros(1),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": mx.zeros((1, 77)),
        "text_encoders.t5xxl.transformer.decoder.block.0.layer.0.SelfAttention.q.weight": mx.zeros((4, 4)),
        "model_ema.decay": mx.zeros(1),
        "vision_model.embeddings.class_embedding": mx.zeros(4),
    }
    average = {
        "ema." + name: mx.zeros(w.shape)
        for name, w in all_in_one(model).items()
        if "double_blocks.0.img_attn.qkv" in name
    }
    tensors.save(tmp_path / "a/all.safetensors", all_in_one(model) | foreign | average)
    checkpoint, lines = found(tmp_path / "a")
    assert_is(checkpoint, model)
    assert len(lines) == 1
    assert str(tmp_path / "a/all.safetensors") in lines[0]
    assert "__index_timestep_zero__" in lines[0]
    assert "and 2 more" in lines[0]  # six of eight are shown

    write(tmp_path / "b", model)
    parts = parts_of(model)
    tensors.save(tmp_path / "b/flux1-dev.safetensors", parts["transformer"] | {"__x0__": mx.zeros(0)})
    vision = {"vision_model.post_layernorm.weight": mx.zeros(4), "visual_projection.weight": mx.zeros((4, 4))}
    tensors.save(tmp_path / "b/clip_l.safetensors", parts["clip"] | vision | {"logit_scale": mx.zeros(1)})
    decoder = {"decoder.final_layer_norm.weight": mx.zeros(4), "lm_head.weight": mx.zeros((4, 4))}
    tensors.save(tmp_path / "b/t5xxl_fp16.safetensors", parts["t5"] | decoder)
    checkpoint, lines = found(tmp_path / "b")
    assert_is(checkpoint, model)
    assert [line.partition(": passed over")[0] for line in lines] == [
        str(tmp_path / "b" / name)
        for name in ("flux1-dev.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors")
    ]


def other_vae() -> dict[str, mx.array]:
    """SDXL's: 4 channels."""
    ae = tiny.randomize(AutoEncoder(replace(tiny.AE, z_channels=2)), 3)
    return keymaps.to_file("ae", tiny.parameters(ae), diffusers=False)


STRANGERS = {
    "sdxl.safetensors": (SDXL, "Stable Diffusion or SDXL"),
    "vae.safetensors": ("vae", "another autoencoder"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "page.safetensors": (b"<!DOCTYPE html>\n<html><head></head></html>", "an HTML page"),
    "broken.safetensors": (b"\x10" + bytes(7) + b"not json at all!", "not a safetensors file"),
    "empty.gguf": (b"", "cut short"),
    "half.safetensors.part": (b"\x10" + bytes(7) + b"{}", "not finished"),
    "zeros.safetensors": (bytes(64), "not finished"),
    "chroma.safetensors": ({"distilled_guidance_layer.in_proj.weight": mx.zeros((4, 4))}, "Chroma"),
    "lora.safetensors": (LORA, "--adapter"),
}


def put_stranger(folder: Path, name: str) -> str:
    """Writes it; what a line is to call it."""
    content, words = STRANGERS[name]
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        tensors.save(folder / name, other_vae() if content == "vae" else content)
    return words


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_stops_no_whole_model(name, model, tmp_path):
    words = put_stranger(write(tmp_path, model), name)
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_alone_is_named(name, tmp_path):
    words = put_stranger(tmp_path, name)
    with pytest.raises(FluxError) as error:
        checkpoints.find(str(tmp_path))
    assert words in str(error.value) or (name == "vae.safetensors" and "no transformer" in str(error.value))
    assert "\n" not in str(error.value)
    if not name.endswith(".part"):
        with pytest.raises(FluxError, match="no transformer|not a|cut short|" + words):
            checkpoints.find(str(tmp_path / name))


def test_all_strangers_in_one_line(model, tmp_path):
    write(tmp_path, model)
    for name in STRANGERS:
        put_stranger(tmp_path, name)
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}: passed over: ")
    assert "and 5 more" in lines[0]


def test_of_two_that_fit_the_reason_is_said(model, tmp_path):
    write(tmp_path, model, TREES["comfyui"])
    half = {name: w.astype(mx.float16) for name, w in parts_of(model)["t5"].items()}
    tensors.save(tmp_path / "models/text_encoders/t5xxl_a.safetensors", half)
    checkpoint, lines = found(tmp_path)
    assert checkpoint.parts["t5"].files[0].name == "t5xxl_fp16.safetensors"
    assert lines == [
        f"{tmp_path}: took models/text_encoders/t5xxl_fp16.safetensors for the T5 text encoder, not "
        "models/text_encoders/t5xxl_a.safetensors: it is the larger one; --t5 FILE takes another"
    ]


def test_a_model_that_wants_more_comes_second(model, tmp_path):
    """Fill and Kontext beside dev, larger or first in order, do not keep dev from being run."""
    write(tmp_path, model)
    own = parts_of(model)["transformer"]
    wide = mx.zeros((64, 16 + 16 + 256))
    tensors.save(tmp_path / "flux1-a-fill.safetensors", own | {"img_in.weight": wide})
    tensors.save(tmp_path / "flux1-a-kontext.safetensors", own)
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert len(lines) == 1
    assert "took flux1-dev.safetensors for the transformer, not flux1-a-fill.safetensors, " in lines[0]
    assert "it makes a picture of a text alone" in lines[0]


def test_the_usual_name_comes_first(model, tmp_path):
    """A whole CLIP, with its picture half, is larger."""
    write(tmp_path, model)
    vision = {"vision_model.post_layernorm.weight": mx.zeros(10**6)}
    tensors.save(tmp_path / "ViT-L-14.safetensors", parts_of(model)["clip"] | vision)
    checkpoint, lines = found(tmp_path)
    assert checkpoint.parts["clip"].files[0].name == "clip_l.safetensors"
    assert len(lines) == 1
    assert "it has the usual name" in lines[0]


def test_an_all_in_one_file_keeps_its_own_parts(model, tmp_path):
    """Parts of another model beside it are not mixed in."""
    tensors.save(tmp_path / "checkpoints/all.safetensors", all_in_one(model))
    other = tiny.randomize(AutoEncoder(model.ae.params), 77)
    tensors.save(tmp_path / "vae/ae.safetensors", keymaps.to_file("ae", tiny.parameters(other), False))
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert len(lines) == 1
    assert "it is in the transformer's file" in lines[0]


def test_variant_shards_with_their_index(model, tmp_path):
    """diffusers' fp16 variant: both spellings of the shards, and of the index."""
    save.save_diffusers(tmp_path / "m", model, dtype=None)
    (tmp_path / "m/defaults.json").unlink()
    for sub, stem, index in (
        (
            "transformer",
            "diffusion_pytorch_model.fp16-{}",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        ("text_encoder_2", "model-{}.fp16", "model.fp16.safetensors.index.json"),
    ):
        file = next((tmp_path / "m" / sub).glob("*.safetensors"))
        content = mx.load(str(file))
        names = sorted(content)
        weight_map = {}
        for i in (1, 2):
            shard = stem.format(f"0000{i}-of-00002") + ".safetensors"
            tensors.save(file.parent / shard, {name: content[name] for name in names[i - 1 :: 2]})
            weight_map |= dict.fromkeys(names[i - 1 :: 2], shard)
        mx.eval(content)
        file.unlink()
        (file.parent / index).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint, lines = found(tmp_path / "m")
    assert_is(checkpoint, model)
    assert lines == []
    for index in tmp_path.rglob("*.index*.json"):
        index.unlink()
    assert_is(found(tmp_path / "m")[0], model)  # by their numbers
    shard = next((tmp_path / "m/transformer").glob("*00002-of*"))
    assert_is(found(tmp_path / "m", transformer=str(shard))[0], model)  # one of them stands for all
    shard.unlink()
    with pytest.raises(FluxError, match="1 of 2 shards are there"):
        checkpoints.find(str(tmp_path / "m"))


def test_the_folder_of_a_run(model, tmp_path):
    """A pretraining writes its model into model/; beside it lie states and vocabularies."""
    save.save_bfl(tmp_path / "run/model", model)
    write_tokenizers(tmp_path / "run", model)
    state = {"model.flow." + name: w for name, w in parts_of(model)["transformer"].items()}
    tensors.save(tmp_path / "run/checkpoints/00001/state.safetensors", state)
    checkpoint, lines = found(tmp_path / "run")
    assert_is(checkpoint, model)
    assert lines == []
    save.save_bfl(tmp_path / "run/older", model)
    os.utime(tmp_path / "run/older", (0, 0))
    checkpoint, lines = found(tmp_path / "run")
    assert checkpoint.parts["transformer"].files[0].parent.name == "model"
    assert lines == [f"{tmp_path / 'run'}: took model/, the newest of 2 models in it"]


def test_a_file_replaces_a_part_under_the_models_config(model, tmp_path):
    """A config says what tensors cannot: for weights of the same size from elsewhere too."""
    odd = tiny.model(model.clip_tokenizer, model.t5_tokenizer)  # 8 norm groups, heads of 8
    save.save_diffusers(tmp_path / "m", odd, dtype=None)
    other = tiny.randomize(AutoEncoder(odd.ae.params), 77)
    tensors.save(tmp_path / "other.safetensors", keymaps.to_file("ae", tiny.parameters(other), False))
    checkpoint, _ = found(tmp_path / "m", ae=str(tmp_path / "other.safetensors"))
    assert checkpoint.load_ae(mx.float32).params == odd.ae.params
    assert tiny.same(checkpoint.load_ae(mx.float32), other)
    bigger = tiny.randomize(AutoEncoder(replace(odd.ae.params, num_res_blocks=2)), 77)
    tensors.save(tmp_path / "other.safetensors", keymaps.to_file("ae", tiny.parameters(bigger), False))
    with pytest.raises(FluxError, match=r"16 channels in 32 norm groups"):
        found(tmp_path / "m", ae=str(tmp_path / "other.safetensors"))[0].load_ae()


def test_depth_and_loops_are_bounded(model, tmp_path):
    write(tmp_path, model)
    (tmp_path / "loop").symlink_to(tmp_path)
    deep = tmp_path / "1/2/3/4/5/flux1-dev.safetensors"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(b"broken")
    assert found(tmp_path)[1] == []


def write_gguf(path: Path, architecture: str, content: dict[str, mx.array]) -> None:
    gguf = pytest.importorskip("gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for name, w in content.items():
        writer.add_tensor(name, np.array(w))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def test_gguf_in_a_tree(model, tmp_path):
    """A transformer under BFL's names, a T5 under llama.cpp's, the others in safetensors."""
    write(tmp_path, model, TREES["comfyui"])
    parts = parts_of(model)
    write_gguf(tmp_path / "models/unet/flux1-dev-F32.gguf", "flux", parts["transformer"])
    theirs = {ours: name for name, ours in [*gguf_names.T5_BLOCK.items(), *gguf_names.T5.items()]}
    t5 = {}
    for name, w in parts["t5"].items():
        module, _, parameter = name.rpartition(".")
        match = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.+)", module)
        t5[
            f"enc.blk.{match[1]}.{theirs[match[2]]}.{parameter}" if match else f"{theirs[module]}.{parameter}"
        ] = w
    write_gguf(tmp_path / "models/clip/t5-v1_1-xxl-encoder-F32.gguf", "t5encoder", t5)
    for file in (TREES["comfyui"][0], TREES["comfyui"][3]):
        (tmp_path / file).unlink()
    checkpoint, lines = found(tmp_path)
    assert_is(checkpoint, model)
    assert {part.files[0].suffix for part in checkpoint.parts.values()} == {".gguf", ".safetensors"}
    assert checkpoint.spec.name == "dev"
    assert len(checkpoint.fingerprints()) == 6
    assert lines == []


@pytest.mark.parametrize("kind", LOADERS)
def test_signs_of_the_real_files(kind, shared):
    """Every published layout is recognized, and each file as that part alone."""
    references = {
        "transformer": ("flux1-dev.bfl", "flux1-dev.diffusers", "flux1-schnell.bfl", "flux1-fill-dev.bfl"),
        "ae": ("ae.bfl", "ae.diffusers"),
        "clip": ("clip_l.transformers",),
        "t5": ("t5xxl.transformers",),
    }
    for name in references[kind]:
        names = list(json.loads((shared / "reference" / f"{name}.json").read_text()))
        assert prefixes.parts_in(names) == [kind]
        assert strangers.model(names) is None
        assert prefixes.foreign_names(names) == []
