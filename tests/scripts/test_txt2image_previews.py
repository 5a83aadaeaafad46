"""txt2image.py while it works: previews, Ctrl-C, and features of prompts that are kept."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import txt2image
from flux import generation, images, metadata
from flux.models.autoencoder_tiny import TinyDecoder, TinyDecoderParams
from flux.models.t5 import T5Encoder

from .. import tiny

save = images.save

PROMPT = "a red apple on a blue background"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_previews_change_nothing_and_are_gone(call, model, tmp_path, monkeypatch):
    assert call(PROMPT, "--model", model, "--seed", 3, "--steps", 4, "--output", "a.png")[0] == 0
    written = []
    monkeypatch.setattr(
        txt2image.previews.images, "save", lambda path, *args: (written.append(path), save(path, *args))
    )
    options = ("--preview-every", 2, "--output", "b.png")
    status, out, _ = call(PROMPT, "--model", model, "--seed", 3, "--steps", 4, *options)
    assert (status, out) == (0, ["b.png"])
    assert [Path(path).name for path in written] == ["b.preview.png"] * 2 + ["b.png"]
    assert files(tmp_path) == ["a.png", "b.png"]
    a, b = (images.load(tmp_path / name)[0] for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)


def test_a_preview_decoder(call, model, tmp_path):
    weights = tiny.parameters(tiny.randomize(TinyDecoder(TinyDecoderParams(16, 8, (1, 1, 1, 1))), 1))
    weights = {f"decoder.{n}": w.transpose(0, 3, 1, 2) if w.ndim == 4 else w for n, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "taef1.safetensors"), weights)
    options = ("--preview-every", 1, "--preview-decoder", "taef1.safetensors")
    assert call(PROMPT, "--model", model, "--seed", 3, *options)[:2] == (0, ["out.png"])
    for wrong, message in ((("--preview-decoder", "x"), "--preview-every"), ((*options[:3], "x.st"), "x.st")):
        status, _, err = call(PROMPT, "--model", model, *wrong)
        assert status == 2
        assert message in err[-1]


def test_interrupted_with_previews(environment, model, tmp_path):
    """The picture in work is left as far as it was, and told of in one line."""
    command = [sys.executable, txt2image.__file__, "--model", model, "--steps", "3000", PROMPT]
    command += ["--preview-every", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.preview.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.startswith("seed: ")
    assert out.count("\n") == 1
    assert err.endswith("interrupted: 0 of 1 pictures were finished; the latest preview: out.preview.png\n")
    assert "Traceback" not in err
    assert files(tmp_path) == ["out.preview.png"]
    assert images.load(tmp_path / "out.preview.png")[0].shape == (64, 48, 3)


@pytest.mark.parametrize("raw", [(), ("--save-raw",)])
def test_finished_pictures_are_saved_when_interrupted(call, model, tmp_path, monkeypatch, raw):
    """Each in its file, as --save-raw writes it, from which it is made again."""
    options = (PROMPT, "--model", model, "--n-images", 3, "--seed", 5)
    assert call(*options, "--save-raw", "--output", "all.png")[0] == 0

    def interrupted(*args, **settings):
        def on_step(request, step, x):
            if request.seeds == (7,):
                raise KeyboardInterrupt

        return generation.generate(*args, **settings, on_step=on_step)

    monkeypatch.setattr(txt2image, "generate", interrupted)
    status, out, err = call(*options, "--output", "some.png", *raw)
    assert (status, out) == (130, ["some.0.png", "some.1.png"])
    assert err[-1] == "interrupted: 2 of 3 pictures were finished"
    assert not [name for name in files(tmp_path) if name.startswith("some.2")]
    for i in range(2):
        found, expected = (images.load(tmp_path / f"{name}.{i}.png")[0] for name in ("some", "all"))
        assert np.array_equal(found, expected)
        assert metadata.read(tmp_path / f"some.{i}.png")[0]["picture"] == i


def test_a_text_cache(call, model, tmp_path, monkeypatch):
    options = (PROMPT, "--model", model, "--seed", 3)
    assert call(*options, "--output", "plain.png")[0] == 0
    assert call(*options, "--output", "a.png", "--text-cache", "./texts")[0] == 0

    def asked(*_):
        raise AssertionError("T5 was asked")

    monkeypatch.setattr(T5Encoder, "__call__", asked)
    assert call(*options, "--output", "b.png", "--text-cache", "texts")[0] == 0
    plain, *others = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "a", "b"))
    assert others == [plain, plain]


def test_a_prompt_is_not_taken_for_the_cache(call, model, tmp_path):
    status, _, err = call("--model", model, "--text-cache", PROMPT)
    assert status == 2
    assert len(err) == 1
    assert f"argument --text-cache: no folder is called {PROMPT!r}; a new one is written with a /" in err[0]
    assert files(tmp_path) == []


def test_the_usual_cache(call, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert call(PROMPT, "--model", model, "--text-cache")[0] == 0
    assert len(list((tmp_path / "caches" / "flux-mlx" / "texts").rglob("*.safetensors"))) == 1
