"""dreambooth.py as a person runs it, on the built-in model and without a network."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dreambooth
import txt2image
from flux import adapters, images
from flux.training.report import read_lines

from ..datasets import two_concepts, write_pictures, write_toml

SCRIPT = Path(dreambooth.__file__)
TINY = ("--model", "tiny", "--lora-rank", 2, "--class-prompt", "an sks dog")
TOML = """
[general]
class_tokens = "an sks dog"
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 16
[[datasets.subsets]]
image_dir = "pictures"
num_repeats = 2
flip_aug = true
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with three pictures in pictures/."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", {"a.png": (64, 64), "b.png": (70, 64), "c.png": (64, 64)})
    return tmp_path


@pytest.fixture
def start(environment):
    """Starts the script as a process that reaches no network."""

    def start(*args: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, args)], env=environment, **pipes)

    return start


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script's main function: status, lines of stdout, lines of stderr."""

    def call(*args: str, script=dreambooth) -> tuple[int, list[str], list[str]]:
        handler = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        status = script.main()
        signal.signal(signal.SIGINT, handler)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


def test_train_interrupt_resume_and_draw(start, call, folder):
    """Ctrl-C in the middle; what is resumed ends, and txt2image.py draws with it."""
    process = start("pictures", *TINY, "--iterations", 200, "--learning-rate", "3e-3", "--state-every", 1)
    for line in process.stderr:
        if line.startswith("iteration"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "stopped; go on with: python dreambooth.py --resume mlx_output" in err
    done = int(max(path.name for path in (folder / "mlx_output/states").iterdir()))
    assert 0 < done < 200
    more = ("--iterations", done + 2, "--format", "kohya", "--trigger", "sks dog")
    process = start("--resume", "mlx_output", *more)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (0, "mlx_output/final_adapters.safetensors\n"), err
    updates = [line["update"] for line in read_lines(folder / "mlx_output/events.jsonl")]
    assert updates == list(range(1, done + 3))
    adapter = adapters.load("mlx_output/final_adapters.safetensors")
    assert adapter.format == "kohya"
    facts = adapters.read_facts(adapter.metadata)
    assert (facts["trigger"], facts["steps"], facts["base_model"]) == ("sks dog", str(done + 2), "tiny")
    drawn = ("an sks dog", "--model", "tiny", "--steps", 2, "--seed", 1)
    assert call(*drawn, "--output", "base.png", script=txt2image)[0] == 0
    adapted = ("--adapter", "mlx_output/final_adapters.safetensors", "--output", "adapted.png")
    assert call(*drawn, *adapted, script=txt2image)[::2] == (0, [])
    assert not np.array_equal(images.load("base.png")[0], images.load("adapted.png")[0])


def test_sigterm_saves_the_state_as_ctrl_c_does(start, folder):
    """Also in the middle of an update, between two of its batches."""
    process = start("pictures", *TINY, "--iterations", 400, "--grad-accumulate", 2, "--state-every", 400)
    for line in process.stderr:
        if line.startswith("iteration"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "stopping: saving the state\nstopped; go on with: python dreambooth.py --resume mlx_output" in err
    names = sorted(path.name for path in (folder / "mlx_output/states").iterdir())
    assert names[0] == "00000000"
    assert 0 < int(names[1]) < 400


def test_a_data_toml_qlora_and_every_kind_of_option(call, folder):
    """Several at once, as most are independent. Six samples an epoch, in batches of at most two."""
    write_toml(folder, TOML)
    options = ("--quantize", 4, "--optimizer", "prodigy", "--lr-schedule", "cosine", "--lora-dropout", 0.1)
    more = ("--lora-targets", "attention", "--lora-blocks", 2, "--ema", 0.9, "--time-sampling", "flux_shift")
    names = ("--name", "dog", "--save-every-epochs", 1, "--grad-checkpoint", "--output-dir", "out")
    watch = ("--progress-prompt", "an sks dog")
    size = ("--model", "tiny", "--epochs", 2, "--lora-rank", 4)
    status, out, err = call("--config", "data.toml", *size, *options, *more, *names, *watch)
    assert (status, out) == (0, ["out/dog.safetensors"]), err
    found = sorted(path.name for path in (folder / "out").glob("*.safetensors"))
    assert found == ["dog-000001.safetensors", "dog-000002.safetensors", "dog.safetensors"]
    progress = sorted((folder / "out/progress").iterdir())
    assert [path.name for path in progress] == ["step00000000.png", f"step{2 * 3:08d}.png"]
    assert images.load(progress[0])[0].shape == (64, 64, 3)
    layers = adapters.load("out/dog.safetensors").modules
    assert {name.split(".")[1] for name in layers} == {"2", "3"}  # the last two of four single blocks


def test_check_data(call, folder):
    status, out, err = call("--check-data", "pictures", "--resolution", 64, "--class-prompt", "an sks dog")
    assert (status, err) == (0, [])
    assert "3 steps an epoch" in out
    assert "caption (3): an sks dog" in out
    out = call("--check-data", "pictures", "--resolution", 64, "--class-prompt", "a dog", "--trigger", "sks")[
        1
    ]
    assert any(line.startswith("warning: the trigger 'sks' is in no caption") for line in out)
    (folder / "pictures/d.png").write_bytes(b"no picture")
    status, out, _ = call("--check-data", "pictures", "--resolution", 64)
    assert status == 2
    assert any(line.startswith("error: ") and "d.png" in line for line in out)
    assert any(line.startswith("error: 4 without a caption") for line in out)
    status, out, _ = call("--check-data", "pictures", "--resolution", 64, "--uncaptioned")
    assert any(line.startswith("warning: 4 without a caption") for line in out)
    assert not (folder / "mlx_output").exists()


def test_captions_of_any_column_masks_and_pictures_without_captions(call, folder):
    """The options of the reader, from the command line to the batches."""
    rows = [{"file_name": f"{name}.png", "style": f"style {name}"} for name in "abc"]
    (folder / "pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pictures/masks").mkdir()
    for name, height in {"a": 64, "b": 70, "c": 64}.items():
        mask = np.zeros((height, 64), np.uint8)
        mask[:32] = 255
        Image.fromarray(mask).save(folder / f"pictures/masks/{name}.png")
    status, out, _ = call("--check-data", "pictures", "--resolution", 64)
    assert status == 2
    assert any("it has file_name, style" in line for line in out)
    options = ("--caption-column", "style", "--mask-floor", "0.5", "--resolution", 64)
    status, out, _ = call("--check-data", "pictures", *options)
    assert status == 0
    assert "caption (1): style a" in out
    assert "3 pictures with a masked loss" in out
    model = ("--model", "tiny", "--lora-rank", 2, "--iterations", 2)
    status, _, err = call("pictures", *model, *options, "--output-dir", "masked")
    assert status == 0
    assert any(line.startswith("warning: the loss is masked: 3 pictures") for line in err)
    (folder / "pictures/metadata.jsonl").unlink()
    status, _, err = call("pictures", *model, "--output-dir", "out")
    assert (status, list(folder.glob("out/*.safetensors"))) == (2, [])
    assert "3 without a caption" in err[-1]
    assert call("pictures", *model, "--uncaptioned", "--output-dir", "out")[0] == 0


def test_the_two_concept_set(call, folder, shared):
    toml = two_concepts(shared, folder)
    status, out, _ = call("--check-data", "--config", toml)
    assert status == 0
    assert out[0].endswith("13 pictures to learn, 20 samples an epoch")
    assert "20 steps an epoch" in out


BAD_ARGUMENTS = [
    ([], "no data set"),
    (["nowhere"], "nowhere: is not a folder, a file"),
    (["--check-data"], "--check-data needs a data set"),
    (["--check-data", "nowhere"], "nowhere: is not a folder, a file"),
    (["pictures", "--config", "data.toml"], "not both"),
    (["pictures", "--iterations", "0"], "iterations: .*0"),
    (["pictures", "--iterations", "3", "--epochs", "3"], "iterations or epochs"),
    (["pictures", "--lora-rank", "-1"], "lora-rank: .*-1"),
    (["pictures", "--lora-targets", "nothing"], "targets 'nothing': no layer"),
    (["pictures", "--learning-rate", "nan"], "learning-rate: .*nan"),
    (["pictures", "--learning-rate", "0"], "learning-rate 0"),
    (["pictures", "--optimizer", "sgd"], "optimizer: .*sgd"),
    (["pictures", "--optimizer", "adam", "--weight-decay", "0.1"], r"weight decay 0\.1"),
    (["pictures", "--quantize", "3"], "quantize '3'"),
    (["pictures", "--resolution", "100"], "resolution: 100"),
    (["pictures", "--validation-split", "2"], "validation_split: 2"),
    (["pictures", "--warmup", "5", "--iterations", "5"], "warm-up of 5"),
    (["pictures", "--model", "tine"], "tine.*tiny"),
    (["pictures", "--adapter", "none.safetensors"], r"none\.safetensors"),
    (["pictures", "--fuse-adapter"], "fuse-adapter needs"),
    (["pictures", "--no-such-option"], "--no-such-option"),
    (["--resume", "nowhere"], "nowhere: no state of a run"),
]


@pytest.mark.parametrize(("args", "message"), BAD_ARGUMENTS)
def test_bad_input_has_one_clear_line(call, folder, args, message):
    model = [] if "--model" in args or "--resume" in args else ["--model", "tiny"]
    captioned = ["--class-prompt", "x"] if "pictures" in args else []
    status, out, err = call(*args, *model, *captioned)
    assert (status, out) == (2, [])
    assert err[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in err) == 1
    assert re.search(message, err[-1])
    assert not list(folder.glob("mlx_output/*.safetensors"))
    assert not (folder / "mlx_output/states").exists()


def test_help_is_complete(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group in dreambooth.build_parser()._action_groups[2:]:
        assert group.title in text
        for action in group._group_actions:
            assert action.help
            assert (action.option_strings or [action.metavar])[-1] in text
