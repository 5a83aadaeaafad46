"""txt2image.py with models as people have them: one file, a tree, strangers, what cannot run."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux import images
from flux.weights import checkpoints, keymaps, prefixes, tensors

from .. import tiny

PROMPT = ("a red apple", "--seed", 7)
FOLDERS = ("vae", "text_encoder", "text_encoder_2", "transformer", "tokenizer", "tokenizer_2")
KINDS = ("transformer", "ae", "clip", "t5")


@pytest.fixture(scope="module")
def parts(model) -> dict[str, dict[str, mx.array]]:
    """The model's tensors as single files have them."""
    found = checkpoints.find(model)
    return {
        kind: keymaps.to_file(
            kind, tiny.parameters(checkpoints.load_part(found.parts[kind], mx.float16)), False
        )
        for kind in KINDS
    }


@pytest.fixture
def tree(model, tmp_path) -> Path:
    """What a model's folder holds besides weights: here the odd networks' configs, and the vocabularies."""
    for name in FOLDERS:
        shutil.copytree(Path(model) / name, tmp_path / "tree" / name)
    for file in (tmp_path / "tree").rglob("*.safetensors"):
        file.unlink()
    shutil.copy(Path(model) / "defaults.json", tmp_path / "tree")
    return tmp_path / "tree"


def picture(path: Path) -> np.ndarray:
    return images.load(path)[0]


def all_in_one(parts: dict[str, dict[str, mx.array]]) -> dict[str, mx.array]:
    return {prefixes.PREFIXES[kind][0] + name: w for kind, own in parts.items() for name, w in own.items()}


def test_one_file(call, model, parts, tree, tmp_path):
    """Alone in a folder, and as the model itself, it makes the folder's picture."""
    foreign = {"__index_timestep_zero__": mx.zeros(0), "text_encoders.clip_l.logit_scale": mx.zeros(1)}
    tensors.save(tree / "checkpoints/all.safetensors", all_in_one(parts) | foreign)
    assert call(*PROMPT, "--model", model, "--output", "a.png")[0] == 0
    wanted = picture(tmp_path / "a.png")
    for name in (tree, tree / "checkpoints/all.safetensors"):
        status, out, err = call(*PROMPT, "--model", name, "--output", "b.png")
        assert (status, out) == (0, ["b.png"])
        assert [line for line in err if "warning" in line] == [
            f"warning: {tree / 'checkpoints/all.safetensors'}: passed over, as no network here takes them: "
            "__index_timestep_zero__, text_encoders.clip_l.logit_scale"
        ]
        assert (picture(tmp_path / "b.png") == wanted).all()


def test_a_tree_with_strangers(call, model, parts, tree, tmp_path):
    files = ("models/unet/x.safetensors", "models/vae/ae.sft", "models/clip/c.safetensors", "t5.safetensors")
    for file, own in zip(files, parts.values(), strict=True):
        tensors.save(tree / file, own)
    (tree / "models/checkpoints").mkdir()
    (tree / "models/checkpoints/sd_xl.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (tree / "models/vae/page.safetensors").write_bytes(b"<!doctype html><html>")
    tensors.save(tree / "models/loras/lora.safetensors", {"x.lora_A.weight": mx.zeros(1)})
    assert call(*PROMPT, "--model", model, "--output", "a.png")[0] == 0
    status, _, err = call(*PROMPT, "--model", tree, "--output", "b.png")
    assert status == 0
    (line,) = [line for line in err if "warning" in line]
    assert "git-lfs pointer" in line
    assert "an HTML page" in line
    assert "lora" not in line
    assert (picture(tmp_path / "b.png") == picture(tmp_path / "a.png")).all()


def test_what_cannot_run_is_one_line_before_any_work(call, model, parts, tmp_path):
    own = parts["transformer"]
    wide = mx.concatenate([own["img_in.weight"], mx.zeros((len(own["img_in.weight"]), 320), mx.float16)], 1)
    tensors.save(tmp_path / "fill.safetensors", own | {"img_in.weight": wide})
    tensors.save(tmp_path / "chroma.safetensors", own | {"distilled_guidance_layer.x.weight": mx.zeros(1)})
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x")
    for name, words in (
        ("fill", "fill fills a part"),
        ("chroma", "Chroma"),
        ("pointer", "git-lfs pointer"),
    ):
        status, out, err = call(*PROMPT, "--model", model, "--transformer", f"{name}.safetensors")
        assert (status, out) == (2, [])
        assert len(err) == 1
        assert words in err[0]
    status, _, err = call(*PROMPT, "--model", "pointer.safetensors")
    assert status == 2
    assert err == [
        "error: pointer.safetensors: not a safetensors file but a git-lfs pointer, not the file itself: run "
        "`git lfs pull`; to take one part from a file, use --transformer FILE"
    ]


def test_the_shift_is_an_option_and_in_the_recipe(call, model, tmp_path):
    for shift in ("dev", "none", "3"):
        assert call(*PROMPT, "--model", model, "--shift", shift, "--output", f"{shift}.png")[0] == 0
        assert images.read_metadata(tmp_path / f"{shift}.png")["shift"] == shift
    assert call(*PROMPT, "--model", model, "--output", "default.png")[0] == 0
    assert call("--remake", "none.png", "--output", "again.png")[0] == 0
    pictures = {name: picture(tmp_path / f"{name}.png") for name in ("dev", "none", "3", "default", "again")}
    assert (pictures["dev"] == pictures["default"]).all()
    assert (pictures["none"] == pictures["again"]).all()
    assert (pictures["none"] != pictures["dev"]).any()
    assert (pictures["none"] != pictures["3"]).any()
    status, _, err = call(*PROMPT, "--model", model, "--shift", "0")
    assert status == 2
    assert "a shift is dev, none or a factor above 0, not '0'" in err[0]
