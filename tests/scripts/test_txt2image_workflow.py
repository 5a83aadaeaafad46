"""txt2image.py with --workflow and --noise: the same options by hand, the same picture."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flux import FluxPipeline, images
from flux.conditioning import variants
from flux.weights import save

from .. import comfyui_workflows as workflows
from ..model_adapters import CLIP, FLOW, write

LORA = "flux_dreambooth.safetensors"


@pytest.fixture(scope="module")
def comfyui(model, tmp_path_factory) -> Path:
    """ComfyUI's models/: a small model of random weights in four files, a LoRA, and vocabularies beside."""
    flux = FluxPipeline(model)
    folder = tmp_path_factory.mktemp("ComfyUI")
    tokenizers = Path(model) / "tokenizer", Path(model) / "tokenizer_2"
    save.save_bfl(folder / "bfl", save.Model(flux.flow, flux.ae, flux.clip, flux.t5, *tokenizers, flux.spec))
    places = {
        "flux1-dev.safetensors": "unet/flux1-dev.safetensors",
        "text_encoder/model.safetensors": "clip/clip_l.safetensors",
        "text_encoder_2/model.safetensors": "clip/t5xxl_fp16.safetensors",
        "ae.safetensors": "vae/ae.safetensors",
        "tokenizer": "tokenizer",
        "tokenizer_2": "tokenizer_2",
    }
    for old, new in places.items():
        (folder / "models" / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "bfl" / old, folder / "models" / new)
    write(folder / "models/loras" / LORA, {**FLOW, **CLIP})
    return folder / "models"


def pixels(path: Path) -> np.ndarray:
    return images.load(path)[0].astype(float)


def by_hand(comfyui: Path, *more: object) -> tuple[object, ...]:
    files = ("--model", comfyui, "--transformer", comfyui / "unet/flux1-dev.safetensors")
    files += ("--clip", comfyui / "clip/clip_l.safetensors", "--t5", comfyui / "clip/t5xxl_fp16.safetensors")
    sampling = ("--guidance", 2.5, "--steps", 3, "--image-size", 64, "--seed", 7, "--noise", "torch")
    comfy = ("--schedule", "simple", "--t5-padding", 256, "--rounding", "comfyui")
    return (*files, "--ae", comfyui / "vae/ae.safetensors", *sampling, *comfy, *more)


@pytest.mark.parametrize("form", [workflows.api, workflows.editor], ids=["api", "editor"])
def test_a_workflow_is_the_same_options_by_hand(call, comfyui, tmp_path, form):
    (tmp_path / "w.json").write_text(json.dumps(form(workflows.finetuned())))
    status, out, err = call("--workflow", "w.json", "--model", comfyui, "--output", "a.png")
    assert (status, out) == (0, ["a.png"])
    shift = np.exp(0.5 + (16 - 256) * 0.65 / 3840)
    adapter = ("--adapter", f"{comfyui}/loras/{LORA}:0.8")
    hand = by_hand(comfyui, *adapter, "--shift", shift, workflows.PROMPT, "--output", "b.png")
    assert call(*hand)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    shown = err[-1] if form is workflows.api else err[1]
    for part in (
        "w.json: ",
        "--steps=3",
        "--noise=torch",
        "--seed=7",
        f"{LORA}:0.8",
        f"'{workflows.PROMPT}'",
    ):
        assert part in shown
    if form is workflows.editor:
        assert "Note" in err[0]


def test_the_command_line_that_is_shown_makes_the_same_picture(call, comfyui, tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(workflows.api(workflows.ksampler(steps=2))))
    status, _, err = call("--workflow", "w.json", "--model", comfyui, "--output", "a.png")
    assert status == 0
    shown = next(line for line in err if "--steps" in line).partition(": ")[2]
    assert call(*shlex.split(shown), "--output", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    text = images.read_metadata(tmp_path / "a.png")
    assert text["clip_prompt"] == "an apple"
    assert text["t5_padding"] == "256"
    assert call("--remake", "a.png", "--output", "c.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_other_options_change_a_workflow(call, comfyui, tmp_path):
    """A picture that carries it; prompt, seed and a file from the command line."""
    chunks = PngImagePlugin.PngInfo()
    nodes = workflows.base()
    nodes["12"][1]["unet_name"] = "nowhere.safetensors"
    chunks.add_text("prompt", json.dumps(workflows.api(nodes)))
    Image.new("RGB", (8, 8)).save(tmp_path / "w.png", pnginfo=chunks)
    change = ("--seed", 9, "--transformer", comfyui / "unet/flux1-dev.safetensors", "two green birds")
    assert call("--workflow", "w.png", "--model", comfyui, *change, "--output", "a.png")[0] == 0
    text = images.read_metadata(tmp_path / "a.png")
    assert (text["prompt"], text["seed"], text["steps"]) == ("two green birds", "9", "3")
    # without it, the file that is not there is named
    status, _, err = call("--workflow", "w.png", "--model", comfyui)
    assert status == 2
    assert "not below" in err[-1]
    assert "nowhere.safetensors (in diffusion_models/ or unet/; or --transformer FILE)" in err[-1]


def test_a_model_by_name_stands_for_the_workflows_files(call, model, tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(workflows.api(workflows.base())))
    assert call("--workflow", "w.json", "--model", "tiny", "--image-size", 64, "--output", "a.png")[0] == 0
    assert images.read_metadata(tmp_path / "a.png")["model"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workflow", "none.json"), "none.json: cannot be read: No such file"),
        (("--workflow", "bad.json"), "bad.json: not a ComfyUI workflow: "),
        (("--workflow", "w.json", "--remake", "a.png"), "--remake and --workflow both say"),
        (("--workflow", "w.json"), "the workflow's files are not below .: "),
        (
            ("--workflow", "unknown.json"),
            "unknown.json: made with nodes that this program does not know: ImageScale",
        ),
    ],
)
def test_bad_workflows_are_one_line_before_anything_is_loaded(call, tmp_path, arguments, message):
    (tmp_path / "bad.json").write_text("{")
    nodes = workflows.base()
    (tmp_path / "w.json").write_text(json.dumps(workflows.api(nodes)))
    nodes["9"][1]["images"] = ("80", 0)
    nodes["80"] = ("ImageScale", {"image": ("8", 0)})
    (tmp_path / "unknown.json").write_text(json.dumps(workflows.api(nodes)))
    status, out, err = call(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"error: {message}")


def test_torch_noise_makes_another_picture_and_is_remembered(call, model, tmp_path):
    common = ("a red apple", "--model", model, "--seed", 3, "--output")
    for noise in ("mlx", "torch", "diffusers"):
        assert call(*common, f"{noise}.png", "--noise", noise)[0] == 0
        assert images.read_metadata(tmp_path / f"{noise}.png").get("noise", "mlx") == noise
    assert not np.array_equal(pixels(tmp_path / "mlx.png"), pixels(tmp_path / "torch.png"))
    # in float32 there is nothing to round
    assert np.array_equal(pixels(tmp_path / "diffusers.png"), pixels(tmp_path / "torch.png"))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_jpeg_and_webp_can_be_made_again(call, model, tmp_path, suffix):
    options = ("--model", model, "--seed", 3, "--steps", 1, "--noise", "torch")
    assert call("a café 🍎", *options, "--output", f"a.{suffix}")[0] == 0
    assert call("--remake", f"a.{suffix}", "--output", f"b.{suffix}")[0] == 0
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_no_metadata(call, model, tmp_path):
    assert (
        call(
            "a red apple", "--model", model, "--seed", 3, "--steps", 1, "--output", "a.png", "--no-metadata"
        )[0]
        == 0
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.info == {}
    status, _, err = call("--remake", "a.png")
    assert status == 2
    assert "does not say how it was made" in err[0]


def test_the_parameters_line(call, comfyui, tmp_path):
    """AUTOMATIC1111's, with the LoRA in the prompt."""
    options = by_hand(comfyui, "--adapter", f"{comfyui}/loras/{LORA}:0.8", "--negative-prompt", "two birds")
    assert call("a red apple", *options, "--cfg-scale", 2, "--output", "a.png")[0] == 0
    with Image.open(tmp_path / "a.png") as image:
        lines = image.text["parameters"].split("\n")
    assert lines[:2] == ["a red apple <lora:flux_dreambooth:0.8>", "Negative prompt: two birds"]
    assert lines[2].startswith(
        "Steps: 3, Sampler: Euler, Schedule type: Simple, CFG scale: 2.0, Distilled CFG Scale: 2.5, Seed: 7, "
        "Size: 64x64, Model: flux1-dev, Version: flux-mlx "
    )


# --- Before the work ---


@pytest.mark.parametrize("prompt", ["un caf\udce9 rouge", "\ud83d"])
def test_a_prompt_that_is_no_text(call, model, tmp_path, prompt):
    status, out, err = call("--model", model, prompt)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: the prompt '")
    assert "not UTF-8 text" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_in_a_locale_without_utf_8(call, model, tmp_path):
    """Its bytes come one by one, as half surrogates."""
    prompt = "café 東京 😀"
    raw = prompt.encode().decode("ascii", "surrogateescape")
    assert call("--model", model, raw, "--steps", 1, "--seed", 1)[0] == 0
    assert images.read_metadata(tmp_path / "out.png")["prompt"] == prompt


def test_prompts_are_split_at_line_ends_alone(call, model, tmp_path):
    data = "\ufeffa red\u2028apple\x0c on blue\r\n\r\na \x0bdog\x85\nx\u2029y".encode()
    (tmp_path / "p.txt").write_bytes(data)
    options = ("--model", model, "--steps", 1, "--seed", 1, "--save-raw")
    assert call("--prompts-file", "p.txt", *options)[0] == 0
    prompts = [images.read_metadata(tmp_path / f"out.{i}.png")["prompt"] for i in range(3)]
    assert prompts == ["a red\u2028apple\x0c on blue", "a \x0bdog", "x\u2029y"]


@pytest.mark.parametrize("size", ["16384x16384", "999999x999999", "16x99999999999999999999"])
def test_a_size_beyond_memory(call, model, tmp_path, size):
    status, out, err = call("a red apple", "--model", model, "--image-size", size)
    assert (status, out) == (2, [])
    if size.endswith("99999999999999999999"):  # beyond what any option may count
        assert err[-1].startswith("error: argument --image-size: must be HEIGHTxWIDTH")
    else:
        assert err[-1].startswith("error: a picture of ")
        assert "GB" in err[-1]
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_too_long_when_numbered_or_made_of_a_prompts_file(call, model, tmp_path):
    length = 255 - len(f"..{os.getpid()}.part") - len(".png")
    options = ("--model", model, "--steps", 1)
    status, out, err = call("x", *options, "--save-raw", "--output", "a" * length + ".png")
    assert (status, out[1:]) == (2, [])
    assert "File name too long" in err[-1]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / ("a" * (length + 1) + ".txt")).write_text("x")
    status, out, err = call("--prompts", "prompts", *options, "--output", "pictures")
    assert (status, out) == (2, [])
    assert "File name too long" in err[-1]


def test_a_grid_that_is_too_large_for_its_format(call, model):
    """WebP has at most 16383 pixels a side."""
    status, _, err = call("x", "--model", model, "--n-images", 400, "--output", "a.webp", "--seed", 1)
    assert status == 2
    assert "a side can have 16383 pixels at most there, not 64x19200" in err[-1]


@pytest.mark.parametrize("more", [(), ("--save-raw",)])
def test_an_output_name_that_is_too_long(call, tmp_path, more):
    """Before the model is looked for: there is none of that name."""
    status, out, err = call("x", "--model", "nowhere", "--output", "a" * 247 + ".png", *more)
    assert (status, out, len(err)) == (2, [], 1)
    assert "File name too long" in err[0]


def test_kontext_with_two_references(call, comfyui, tmp_path, monkeypatch):
    """The files in ComfyUI's input/; the model is told by its file's name."""
    monkeypatch.setattr(variants, "KONTEXT_SIZES", ((48, 64), (64, 48)))
    name = "flux1-dev-kontext_fp8_scaled.safetensors"
    (comfyui / "unet" / name).symlink_to(comfyui / "unet/flux1-dev.safetensors")
    (comfyui.parent / "input").mkdir()
    for i, file in enumerate(("a.png", "b.png")):
        picture = np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        images.save(comfyui.parent / "input" / file, picture)
    nodes = workflows.kontext("a.png", "b.png")
    nodes["12"][1]["unet_name"] = name
    nodes["31"][1]["steps"] = 2
    (tmp_path / "w.json").write_text(json.dumps(workflows.api(nodes)))
    status, out, err = call("--workflow", "w.json", "--model", comfyui, "--output", "a.png")
    assert (status, out) == (0, ["a.png"]), err
    assert any("cuts a reference to the size of Kontext" in line for line in err)
    assert images.load(tmp_path / "a.png")[0].shape == (48, 64, 3)
    again = [line for line in err if "--reference=" in line]
    assert call(*shlex.split(again[0].split(": ", 1)[1]), "--output", "b.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    other = ("--reference", comfyui.parent / "input/b.png")
    assert call("--workflow", "w.json", "--model", comfyui, *other, "--output", "c.png")[0] == 0
    assert images.read_metadata(tmp_path / "c.png")["reference"].endswith("input/b.png")
    (comfyui / "unet" / name).unlink()
