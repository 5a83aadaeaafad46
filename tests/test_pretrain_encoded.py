"""Latents that are encoded once: what is kept, what is not trusted, and that nothing is encoded twice."""

import mlx.core as mx
import numpy as np
import pytest

from flux.errors import FluxError
from flux.models.autoencoder import AutoEncoder, AutoEncoderParams
from flux.training.matmul_convolution import ProductConv2d
from flux.training.pretrain import prepare as runs
from flux.training.pretrain.config import Step
from flux.training.pretrain.encoded import Encoded, identity
from flux.training.pretrain.run import Run
from flux.training.report import read_lines

from . import pretraining

FLOW = {"name": "flow", "n_epochs": 3, "train_diff": True, "cfg_dropout_prob": 0}


def shape(size: tuple[int, int]) -> tuple[int, ...]:
    return (2, size[0] // 2, size[1] // 2, 3)


def encode(x: mx.array) -> tuple[mx.array, mx.array]:
    return x[:, ::2, ::2], -2 * x[:, 1::2, ::2]


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def test_records_are_kept_by_number_and_size(tmp_path):
    encoded = Encoded(tmp_path / "new", "a", shape, encode)
    assert encoded.read(3, (8, 8)) is None
    made = {
        (row, size): encoded.make(row, picture(row, size))
        for row in (5, 0)
        for size in ((8, 8), (8, 4), (4, 8))
    }
    again = Encoded(tmp_path / "new", "a", shape, encode)
    for (row, size), record in made.items():
        assert np.array_equal(again.read(row, size), record)
        x = picture(row, size).astype(np.float32) / 127.5 - 1
        assert np.allclose(record, [x[::2, ::2], -2 * x[1::2, ::2]], atol=1e-6)
    assert again.read(3, (8, 8)) is None  # between two that are there
    assert again.read(6, (8, 8)) is None
    assert Encoded(tmp_path / "new", "b", shape, encode).read(5, (8, 8)) is None


def test_a_torn_record_is_absent_and_made_again(tmp_path):
    encoded = Encoded(tmp_path, "a", shape, encode)
    record = encoded.make(1, picture(1))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert encoded.read(1, (8, 8)) is None
    file.write_bytes(data[:-9] + b"\x07" + data[-8:])
    assert encoded.read(1, (8, 8)) is None
    encoded.make(1, picture(1))
    assert np.array_equal(encoded.read(1, (8, 8)), record)


def test_a_disk_that_refuses_has_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FluxError, match=r"cannot keep the latents in .*8x8\.latents: File exists"):
        Encoded(tmp_path / "file", "a", shape, encode).make(0, picture(0))


@pytest.fixture
def no_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_a_flow_step_encodes_every_picture_once_also_when_resumed(tmp_path, monkeypatch, no_compiler):
    encodings, original = [], runs.encode
    monkeypatch.setattr(runs, "encode", lambda *args: encodings.append(1) or original(*args))

    def stop(stage, progress) -> None:
        kept.append(sorted((tmp_path / "run/latents").iterdir()))
        if progress.global_step == 4:
            raise KeyboardInterrupt

    kept: list = []
    config = pretraining.config(tmp_path, FLOW, output={"checkpoint_save_interval": 2})
    with pytest.raises(KeyboardInterrupt):
        Run(config, quiet=True, hook=stop).execute()
    run = Run(config, resume=True, quiet=True)
    run.execute()
    assert len(encodings) == 12  # pictures, in three epochs and two sessions
    assert len(kept[0]) == 1
    assert not (tmp_path / "run/latents").exists()
    on_a_cpu = mx.default_device() == mx.cpu
    assert (type(run.networks.ae.encoder.conv_in) is ProductConv2d) == on_a_cpu


def test_kept_latents_give_the_loss_of_the_pictures(tmp_path, monkeypatch, no_compiler):
    def losses(folder) -> list[float]:
        Run(pretraining.config(folder, FLOW), quiet=True).execute()
        lines = read_lines(folder / "run/graph/training_metrics_flow.jsonl")
        return [line["metrics"]["flow"] for line in lines]

    kept = losses(tmp_path / "kept")
    monkeypatch.setattr(Step, "encodes_once", False)
    assert len(kept) == 9
    assert losses(tmp_path / "pictures") == pytest.approx(kept, rel=1e-3)  # Adam enlarges rounding


def test_identity_follows_the_encoder_and_the_settings():
    model = AutoEncoder(AutoEncoderParams(ch=8, ch_mult=(1,), num_res_blocks=1, norm_groups=4))
    first = identity(model, "data", True)
    assert first == identity(model, "data", True)
    assert first != identity(model, "data", False)
    model.encoder.conv_in.bias = model.encoder.conv_in.bias + 1
    assert first != identity(model, "data", True)
