"""txt2image.py with --adapter: the pictures, their recipes, and every bad input."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import txt2image
from flux import images

from ..model_adapters import CLIP, FLOW, HIDDEN, MODULATION, T5, write

SCRIPT = Path(txt2image.__file__)
PROMPT = "a red apple on a blue background"


def pixels(path: Path) -> np.ndarray:
    return images.load(path)[0].astype(float)


def psnr(a: Path, b: Path) -> float:
    return 10 * np.log10(255**2 / max(np.mean((pixels(a) - pixels(b)) ** 2), 1e-9))


def test_two_adapters_and_the_recipe(call, model, tmp_path):
    """As a program of its own; a name with a colon; remade to the byte, and with other adapters."""
    (tmp_path / "my:lora").mkdir()
    write(tmp_path / "my:lora/a.safetensors", {**FLOW, **MODULATION}, seed=1)
    write(tmp_path / "b.safetensors", {**FLOW, **CLIP, **T5}, seed=2)
    adapters = ("--adapter", "my:lora/a.safetensors", "--adapter", "b.safetensors:-0.6")
    options = ("--model", model, "--seed", "3", "--quantize", "8", "--output", "two.png")
    command = [sys.executable, str(SCRIPT), PROMPT, *adapters, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "two.png\n")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["quantized"]
    recipe = images.read_metadata(tmp_path / "two.png")
    assert recipe["adapter"] == "my:lora/a.safetensors:1.0\nb.safetensors:-0.6"
    assert "fuse_adapter" not in recipe
    assert call("--remake", "two.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "two.png").read_bytes()

    base = ("--model", model, "--seed", 3, "--quantize", 8)
    assert call(PROMPT, *base, "--output", "base.png")[0] == 0
    assert "adapter" not in images.read_metadata(tmp_path / "base.png")
    assert psnr(tmp_path / "two.png", tmp_path / "base.png") < 30
    zero = ("--adapter", "b.safetensors:0")  # takes the place of both
    assert call("--remake", "two.png", *zero, "--output", "zero.png")[0] == 0
    assert images.read_metadata(tmp_path / "zero.png")["adapter"] == "b.safetensors:0.0"
    assert np.array_equal(pixels(tmp_path / "zero.png"), pixels(tmp_path / "base.png"))


def test_fused(call, model, tmp_path):
    write(tmp_path / "a.safetensors", {**FLOW, **CLIP, **T5})
    options = ("--model", model, "--seed", 3, "--adapter", "a.safetensors:0.8")
    assert call(PROMPT, *options, "--output", "beside.png")[0] == 0
    assert call(PROMPT, *options, "--output", "fused.png", "--fuse-adapter")[0] == 0
    assert psnr(tmp_path / "fused.png", tmp_path / "beside.png") > 60
    assert images.read_metadata(tmp_path / "fused.png")["fuse_adapter"] == "True"
    assert call("--remake", "fused.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "fused.png").read_bytes()


def test_every_format_gives_the_same_picture(call, model, tmp_path):
    options = ("--model", model, "--seed", 3)
    assert call(PROMPT, *options, "--output", "base.png")[0] == 0
    for format in ("kohya", "diffusers", "native"):
        write(tmp_path / f"{format}.safetensors", {**FLOW, **MODULATION, **CLIP}, format=format)
        adapter = ("--adapter", f"{format}.safetensors:0.7")
        status, _, err = call(PROMPT, *options, *adapter, "--output", f"{format}.png")
        assert (status, err) == (0, [])
        assert psnr(tmp_path / f"{format}.png", tmp_path / "kohya.png") > 60
        assert psnr(tmp_path / f"{format}.png", tmp_path / "base.png") < 30


def test_a_partly_fitting_adapter_warns_in_one_line(call, model, tmp_path):
    write(tmp_path / "a.safetensors", {**FLOW, "single_blocks.30.linear2": (64, 320)})
    status, _, err = call(PROMPT, "--model", model, "--seed", 1, "--adapter", "a.safetensors")
    assert status == 0
    lost = "single_blocks.30.linear2: the model has no such layer"
    assert err == [f"warning: a.safetensors: left out of the adapter: {lost}"]


BAD = [
    (["--adapter", "none.safetensors:0.5"], r"none\.safetensors: cannot be read: No such file"),
    (["--adapter", "no:ne.safetensors"], r"no:ne\.safetensors: cannot be read: No such file"),
    (["--adapter", "good.safetensors:strong"], r"strength of good\.safetensors .* number, not 'strong'"),
    (["--adapter", "good.safetensors:"], r"strength of good\.safetensors .* number, not ''"),
    (["--adapter", "good.safetensors:nan"], r"--adapter: .*finite number, not nan"),
    (["--adapter"], "--adapter: expected one argument"),
    (["--adapter", "good.safetensors", "--adapter", "cut.safetensors"], r"cut\.safetensors: cut short"),
    (["--adapter", "good.safetensors", "--adapter", "good.safetensors:2"], "already.*good.safetensors"),
    (["--adapter", "text.safetensors"], r"text\.safetensors: not a safetensors file"),
    (["--adapter", "folder"], "folder: a folder without"),
    (["--adapter", "weights.safetensors"], r"weights\.safetensors: holds no adapter"),
    (["--adapter", "big.safetensors:0.3"], r"big\.safetensors: nothing .* fits.*qkv"),
    (["--adapter", "canny.safetensors", "--fuse-adapter"], "dev follows a control picture"),
    (["--fuse-adapter"], "--fuse-adapter needs an adapter"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    good = write(folder / "good.safetensors", FLOW).read_bytes()
    mx.save_safetensors(str(folder / "weights.safetensors"), {"img_in.bias": mx.zeros(HIDDEN)})
    write(folder / "big.safetensors", {"double_blocks.0.img_attn.qkv": (9216, 3072)})
    write(folder / "canny.safetensors", {**FLOW, "img_in": (HIDDEN, 128)})
    (folder / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (folder / "text.safetensors").write_text("<html>Not found</html>")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_has_one_clear_line_and_writes_nothing(call, model, tmp_path, bad_files, args, message):
    (tmp_path / "folder").mkdir()
    for name, data in bad_files.items():
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.iterdir())
    status, out, err = call(PROMPT, "--model", model, *args)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ")
    assert re.search(message, err[0])
    assert sorted(tmp_path.iterdir()) == before
