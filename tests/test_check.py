"""The report on a data set: every fault by name, and what an epoch is made of."""

import json

from PIL import Image

from flux.data import check, samples
from tests.datasets import OPTIONS, random_picture, write_pictures, write_toml


def test_check_names_everything_that_is_wrong(tmp_path):
    sizes = {"a.png": (64, 64), "copy.bmp": (64, 64), "tiny.png": (20, 20), "wide.png": (64, 256)}
    write_pictures(tmp_path, sizes)
    Image.open(tmp_path / "a.png").save(tmp_path / "copy.bmp")
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Image.fromarray(random_picture(64, 64, 7, channels=4)).save(tmp_path / "clear.png")
    rows = [{"image": name, "prompt": "x"} for name in (*sizes, "cut.jpg", "clear.png", "absent.png")]
    rows[0]["prompt"] = ""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check.check(samples.load(tmp_path, OPTIONS))
    assert len(report.errors) == 3
    for words, error in zip(("1 without a caption", "cut.jpg", "absent.png"), report.errors, strict=True):
        assert words in error
    warnings = "\n".join(report.warnings)
    for words in (
        f"the same picture more than once: {tmp_path}/a.png = {tmp_path}/copy.bmp",
        f"tiny: {tmp_path}/tiny.png (20x20) is enlarged 3.20 times to 64x64",
        "wide.png (64x256) loses 75% of its area to the crop; enable_bucket",
        f"laid over white (alpha_mask masks the loss): {tmp_path}/clear.png",
    ):
        assert words in warnings
    assert len(report.warnings) == 4
    assert json.loads(json.dumps(report.as_dict()))["errors"] == report.errors
    text = check.render(report)
    assert all(f"error: {error}" in text for error in report.errors)
    assert all(f"warning: {warning}" in text for warning in report.warnings)


def test_check_of_a_mixed_set(tmp_path):
    write_pictures(tmp_path / "a", {f"{i}.png": (64, 64) for i in range(6)})
    write_pictures(tmp_path / "b", {"b.png": (32, 96)})
    write_pictures(tmp_path / "r", {f"r{i}.png": (70 + i, 70) for i in range(9)})
    text = """[general]
batch_size = 2
validation_split = 0.34
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "a"
class_tokens = "sks toy"
num_repeats = 2
alpha_mask = true
[[datasets.subsets]]
image_dir = "r"
class_tokens = "toy"
is_reg = true
[[datasets]]
resolution = [96, 32]
batch_size = 1
[[datasets.subsets]]
image_dir = "b"
class_tokens = "wide"
"""
    report = check.check(samples.load(write_toml(tmp_path, text), {}))
    assert not report.errors
    assert (report.pictures, report.regularisation, report.validation) == (5, 9, 2)
    assert (report.samples_per_epoch, report.steps_per_epoch) == (8 + 8 + 1, 8 + 1)
    assert [(r.group, r.height, r.width, r.pictures, r.samples, r.batches) for r in report.buckets] == [
        (1, 64, 64, 13, 16, 8),
        (2, 32, 96, 1, 1, 1),
    ]
    assert report.captions == {"sks toy": 8, "toy": 8, "wide": 1}
    assert any("unused" in warning and "r8.png" in warning for warning in report.warnings)
    assert any("nothing is transparent" in warning for warning in report.warnings)
    text = check.render(report)
    assert "9 steps an epoch" in text
    assert "1         32 x 96" not in text
    assert "2         32 x 96" in text


def test_check_says_what_is_animated(tmp_path):
    frames = [Image.fromarray(random_picture(seed=i)) for i in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    report = check.check(samples.load(tmp_path, {**OPTIONS, "class_tokens": "x"}))
    assert report.warnings == [f"animated, the first frame is taken: {tmp_path}/a.webp"]
