"""txt2image.py as a person runs it, without a network; what needs no process of its own is called."""

import io
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import txt2image
from flux import __version__, images

from .. import tiny_pipeline

SCRIPT = Path(txt2image.__file__)
PROMPT = "a red apple on a blue background"


@pytest.fixture
def start(tmp_path, environment):
    """Starts the script in an empty folder."""

    def start(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), *map(str, args)]
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "timeout": 100}
        return subprocess.run(command, input=stdin, text=True, encoding="utf-8", **options)

    return start


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_grid_and_its_recipe(start, model, tmp_path):
    began = time.monotonic()
    options = ("--n-images", 3, "--n-rows", 2, "--image-size", "60x48", "--seed", 7, "--steps", 3)
    more = ("--guidance", 2.5, "--negative-prompt", "two green birds", "--cfg-scale", 2, "--verbose")
    done = start(PROMPT, "--model", model, *options, *more, "--output", "grid.png")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # 10 on an idle machine
    assert done.stdout == "grid.png\n"
    assert "warning: the size 60x48 is not a multiple of 16; made 64x48" in done.stderr
    for stage in ("load", "text", "denoise", "decode", "save"):
        assert f"\n{stage} " in done.stderr
    picture, _ = images.load(tmp_path / "grid.png")
    assert picture.shape == (128, 96, 3)
    assert (picture[64:, 48:] == 0).all()  # the fourth place is empty
    assert images.read_metadata(tmp_path / "grid.png") == {
        "prompt": PROMPT,
        "negative_prompt": "two green birds",
        "model": model,
        "dtype": "float32",
        "steps": "3",
        "guidance": "2.5",
        "cfg_scale": "2.0",
        "image_size": "64x48",
        "seed": "7",
        "seeds": "7 8 9",
        "n_images": "3",
        "n_rows": "2",
        "decoding_batch_size": "1",
        "version": f"flux-mlx {__version__}",
    }
    assert start("--remake", "grid.png", "--output", "again.png").returncode == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_prompts_from_standard_input_into_single_files(start, call, model, tmp_path):
    prompts = f"{PROMPT}\n\n  un café “très” noir ☃ \n"
    done = start("--model", model, "--prompts-file", "-", "--n-images", 2, "--save-raw", stdin=prompts)
    assert done.returncode == 0, done.stderr
    seed_line, *paths = done.stdout.splitlines()
    seed = int(seed_line.removeprefix("seed: "))
    assert paths == ["out.0.png", "out.1.png", "out.2.png", "out.3.png"] == files(tmp_path)
    text = [images.read_metadata(tmp_path / path) for path in paths]
    assert [t["prompt"] for t in text] == [PROMPT, PROMPT, "un café “très” noir ☃", "un café “très” noir ☃"]
    assert [int(t["seeds"]) for t in text] == [seed, seed + 1, seed, seed + 1]
    status, _, err = call("--remake", "out.3.png", "--output", "again.png")
    assert (status, err) == (0, [])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.3.png").read_bytes()


def test_without_a_network(start, tmp_path):
    done = start("--model", "schnell", PROMPT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: black-forest-labs/FLUX.1-schnell")
    assert "network" in done.stderr
    assert "tiny" in done.stderr
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == []


def test_interrupted(environment, model, tmp_path):
    command = [sys.executable, str(SCRIPT), "--model", model, "--steps", "3000", PROMPT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's `&` ignores it
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("seed: ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert files(tmp_path) == []


def test_every_way_to_run_gives_the_same_picture(call, model, tmp_path):
    """Loading all at once, decoding in batches and a file of prompts change time and memory, not pictures."""
    (tmp_path / "prompts.txt").write_text(f"two green birds\n{PROMPT}\n", encoding="utf-8")
    common = ("--model", model, "--seed", 3, "--n-images", 2)
    assert call(PROMPT, *common, "--output", "a.png")[0] == 0
    assert call(PROMPT, *common, "--output", "b.png", "--preload-models")[0] == 0
    assert call(PROMPT, *common, "--output", "c.png", "--decoding-batch-size", 2)[0] == 0
    assert call("--prompts-file", "prompts.txt", *common, "--output", "d.png")[0] == 0
    a, b, c, d = (images.load(tmp_path / f"{name}.png")[0] for name in "abcd")
    assert a.shape == (64, 96, 3)
    assert np.array_equal(a, b)
    assert np.abs(a.astype(int) - c).max() <= 1
    assert d.shape == (128, 96, 3)
    assert np.array_equal(a, d[64:])
    assert not np.array_equal(a, d[:64])


def test_remake_with_a_change(call, model, tmp_path):
    common = ("--model", model, "--seed", 3, "--dtype", "float32")
    call(PROMPT, *common, "--output", "a.png", "--no-t5-padding", "--n-images", 2, "--save-raw")
    call(PROMPT, *common, "--output", "expected.png", "--no-t5-padding", "--steps", 1)
    assert call("--remake", "a.0.png", "--n-images", 1, "--steps", 1, "--output", "changed.png")[0] == 0
    assert (tmp_path / "changed.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert images.read_metadata(tmp_path / "changed.png")["no_t5_padding"] == "True"


def test_quantized(call, model, tmp_path):
    assert call(PROMPT, "--model", model, "--seed", 1, "--output", "a.png")[0] == 0
    status, _, lines = call(PROMPT, "--model", model, "--seed", 1, "--output", "b.png", "--quantize", 8)
    assert status == 0
    assert any(
        re.match(r"quantized: transformer \d+ of \d+ layers, .*8 bits in .*; T5 ", line) for line in lines
    )
    assert images.read_metadata(tmp_path / "b.png")["quantize"] == "8"
    a, b = (images.load(tmp_path / name)[0].astype(int) for name in ("a.png", "b.png"))
    assert 0 < np.abs(a - b).mean() < 20
    assert call("--remake", "b.png", "--output", "c.png")[0] == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_long_prompt_warns(call, model):
    status, _, err = call("two green birds on a red apple " * 9, "--model", model, "--steps", 1)
    assert status == 0
    assert len(err) == 1
    assert err[0].startswith("warning: the prompt is longer than the model's 48 tokens; left out: ")


def test_guidance_without_effect_warns(call, tmp_path):
    model = tiny_pipeline.write_checkpoint(tmp_path / "schnell", guidance=False)
    assert call(PROMPT, "--model", model)[::2] == (0, [])
    status, _, err = call(PROMPT, "--model", model, "--guidance", 4)
    assert (status, err) == (0, ["warning: schnell takes no guidance; 4.0 has no effect"])


BAD_ARGUMENTS = [
    ([], "no prompt"),
    ([""], "prompt is empty"),
    ([PROMPT, "  "], "prompt is empty"),
    ([PROMPT, "--image-size", "0"], "image-size: .*0"),
    ([PROMPT, "--image-size=-64x64"], "image-size: .*-64x64"),
    ([PROMPT, "--image-size", "64x64x64"], "image-size: .*64x64x64"),
    ([PROMPT, "--image-size", "big"], "image-size: .*big"),
    ([PROMPT, "--steps", "-1"], "steps: .*-1"),
    ([PROMPT, "--steps", "0"], "steps: .*0"),
    ([PROMPT, "--steps", "many"], "steps: .*many"),
    ([PROMPT, "--n-images", "0"], "n-images: .*0"),
    ([PROMPT, "--n-images", "2", "--n-rows", "3"], r"n-rows 3 .*\(2\)"),
    ([PROMPT, "--decoding-batch-size", "0"], "decoding-batch-size: .*0"),
    ([PROMPT, "--guidance", "nan"], "guidance: .*nan"),
    ([PROMPT, "--quantize", "7"], "quantize: .*7"),
    ([PROMPT, "--seed", "-1"], "seed .*-1"),
    ([PROMPT, "--seed", str(2**64)], f"seed .*{2**64}"),
    ([PROMPT, "--cfg-scale", "0.5"], r"cfg scale .*0\.5"),
    ([PROMPT, "--negative-prompt", "blurry"], "blurry.* cfg scale"),
    ([PROMPT, "--dtype", "int8"], "dtype: .*int8"),
    ([PROMPT, "--no-such-option"], "--no-such-option"),
    ([PROMPT, "--output", "missing/out.png"], "folder missing does not exist"),
    ([PROMPT, "--output", "out.xyz"], r"out\.xyz"),
    ([PROMPT, "--output", "."], "is a folder|no suffix"),
    (["--prompts-file", "none.txt"], r"none\.txt: No such file"),
    (["--prompts-file", "empty.txt"], r"empty\.txt holds no prompt"),
    (["--prompts-file", "latin1.txt"], r"latin1\.txt is not UTF-8"),
    ([PROMPT, "--prompts-file", "empty.txt"], "not from two"),
    (["--remake", "none.png"], r"none\.png: No such file"),
    (["--remake", "plain.png"], r"plain\.png does not say how"),
    (["--remake", "empty.txt"], r"empty\.txt is not a picture"),
    ([PROMPT, "--model", "shnell"], "shnell.*schnell"),
    ([PROMPT, "--model", "."], "no weights"),
    ([PROMPT, "--transformer", "none.safetensors"], r"none\.safetensors"),
]


@pytest.mark.parametrize(("args", "message"), BAD_ARGUMENTS)
def test_bad_input_has_one_clear_line_and_writes_nothing(call, model, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    images.save(tmp_path / "plain.png", np.zeros((4, 4, 3), dtype=np.uint8))
    before = files(tmp_path)
    status, out, err = call(*([] if "--model" in args else ["--model", model]), *args)
    assert status == 2
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert re.search(message, err[0])
    assert files(tmp_path) == before


def test_damaged_checkpoints(call, model, tmp_path):
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut/transformer/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    status, out, err = call(PROMPT, "--model", "cut")
    assert (status, out, len(err)) == (2, [], 1)
    assert weights.name in err[0]
    weights.write_bytes(whole.replace(b"proj_out.bias", b"proj_out.bain", 1))
    status, out, err = call(PROMPT, "--model", "cut")
    assert (status, out) == (2, [])
    assert err[0].startswith("error: ")
    assert weights.name in err[0]
    assert "proj_out.bias" in "".join(err)
    assert files(tmp_path) == ["cut"]


def test_a_failed_run_leaves_the_old_picture(call, model, tmp_path):
    (tmp_path / "out.png").write_bytes(b"precious")
    assert call(PROMPT, "--model", model, "--cfg-scale", "0.5")[0] == 2
    assert (tmp_path / "out.png").read_bytes() == b"precious"


def test_help_is_complete(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group in txt2image.build_parser()._action_groups[2:]:
        assert group.title in text
        for action in group._group_actions:
            assert action.help
            assert (action.option_strings or [action.metavar])[-1] in text


def test_standard_input_may_be_empty(call, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    status, _, err = call("--model", model, "--prompts-file", "-")
    assert status == 2
    assert err == ["error: standard input holds no prompt; it should hold one a line"]
