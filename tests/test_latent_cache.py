"""The cache of latents and text features: encoded once, found again, redone when damaged or out of date."""

import os

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux.data import batches, samples
from flux.data import cache as latents
from flux.errors import FluxError
from tests.datasets import OPTIONS, random_picture, write_pictures

SIDE = 64  # of the pictures; the encoder below makes latents of an eighth


def encode_picture(pixels):
    """Something that sees places and colours: means of 8 x 8 blocks as "mean", their squares as "logvar"."""
    assert pixels.dtype == mx.float32
    batch, height, width, _ = pixels.shape
    blocks = pixels.reshape(batch, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
    return blocks, blocks**2


def encode_text(caption):
    values = mx.array([float(len(caption)), float(sum(map(ord, caption)))])
    return {"t5": mx.stack([values, -values]).astype(mx.bfloat16), "clip": values}


def expected_latent(picture):
    return encode_picture(mx.array(picture[None].astype(np.float32) / 127.5 - 1))[0][0]


class Counting:
    """An encoder that counts its calls."""

    def __init__(self, encode):
        self.encode, self.calls = encode, 0

    def __call__(self, value):
        self.calls += 1
        return self.encode(value)


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", {f"{i}.png": (SIDE, SIDE) for i in range(3)})


def make_plan(folder, seed=0, **options):
    return batches.Plan(samples.load(folder, {**OPTIONS, "class_tokens": "sks toy", **options}), seed)


def fill(cache, plan, identity="ae", seed=0):
    """Encodes what is missing; the number of encoder calls and the latents."""
    store, encode = latents.Latents(cache, identity, seed), Counting(encode_picture)
    for each in store.missing(plan.variants()):
        store.encode(*each, encode)
    assert not store.missing(plan.variants())
    return encode.calls, store


@pytest.fixture
def cache(tmp_path):
    return latents.Cache(tmp_path / "cache")


def entries(plan, epoch=0):
    return [entry for batch in plan.epoch(epoch) for entry in batch.entries]


def test_pictures_are_encoded_once(folder, cache):
    plan = make_plan(folder, num_repeats=4)
    calls, store = fill(cache, plan)
    assert calls == 3
    assert fill(cache, make_plan(folder, num_repeats=2, seed=9))[0] == 0
    for entry in entries(plan):
        found = store.load(entry)
        picture = np.array(Image.open(entry.placed.sample.picture))
        assert mx.array_equal(found["mean"], expected_latent(picture))
        assert mx.array_equal(found["logvar"], expected_latent(picture) ** 2)
        assert set(found) == {"mean", "logvar"}


def test_both_flips_are_kept(folder, cache):
    plan = make_plan(folder, flip_aug=True)
    calls, store = fill(cache, plan)
    assert calls == 6
    seen = set()
    for epoch in range(8):
        for entry in entries(plan, epoch):
            picture = np.array(Image.open(entry.placed.sample.picture))
            picture = picture[:, ::-1] if entry.flip else picture
            assert mx.array_equal(store.load(entry)["mean"], expected_latent(picture))
            assert mx.array_equal(store.load(entry)["logvar"], expected_latent(picture) ** 2)
            seen.add((entry.placed.sample.name, entry.flip))
    assert len(seen) == 6


def test_masks_are_averaged_and_flipped(tmp_path, cache):
    rgba = random_picture(SIDE, SIDE, channels=4)
    rgba[..., 3] = 255
    rgba[:, :20, 3] = 0  # two columns of the latent and half of the third
    (tmp_path / "p").mkdir()
    Image.fromarray(rgba).save(tmp_path / "p/a.png")
    plan = make_plan(tmp_path / "p", flip_aug=True, alpha_mask=True)
    _, store = fill(cache, plan)
    row = np.array([0, 0, 0.5, 1, 1, 1, 1, 1])
    flips = set()
    for epoch in range(12):
        (entry,) = entries(plan, epoch)
        mask = store.load(entry)["mask"]
        assert mask.dtype == mx.float32
        assert np.array_equal(mask, np.tile(row[::-1] if entry.flip else row, (8, 1)))
        flips.add(entry.flip)
    assert flips == {True, False}


def test_masks_of_files_have_a_floor(tmp_path, cache):
    """The floor is not in the cache: another one needs no new encoding."""
    folder = write_pictures(tmp_path / "p", {"a.png": (SIDE, SIDE)})
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[: SIDE // 2] = 255
    (folder / "masks").mkdir()
    Image.fromarray(half).save(folder / "masks/a.png")
    assert fill(cache, make_plan(folder))[0] == 1
    for floor in (0.0, 0.25, 1.0):
        plan = make_plan(folder, mask_floor=floor)
        encoded, store = fill(cache, plan)
        assert encoded == 0
        mask = np.array(store.load(entries(plan, 0)[0])["mask"])
        assert np.array_equal(mask, np.repeat([1.0] * 4 + [floor] * 4, 8).reshape(8, 8))
    Image.fromarray(255 - half).save(folder / "masks/a.png")
    assert fill(cache, make_plan(folder))[0] == 1, "another mask is another entry"


def test_a_reader_beside_never_sees_half_an_entry(folder, cache, tmp_path):
    key = {"kind": "text"}
    for content in (b"old", b"new, and longer"):
        cache.add(key, content)
        link = tmp_path / content.decode()[:3]
        os.link(cache.path(key), link)
    assert (tmp_path / "old").read_bytes() == b"old"
    assert (tmp_path / "new").read_bytes() == b"new, and longer"


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": (32, 64)},
        {"flip_aug": True},
        {"alpha_mask": True},
        {"random_crop": True},
        {"color_aug": True},
    ],
)
def test_other_settings_are_other_entries(folder, cache, options):
    assert fill(cache, make_plan(folder))[0] == 3
    assert fill(cache, make_plan(folder, **options))[0] >= 3
    assert fill(cache, make_plan(folder))[0] == 0


def test_another_encoder_or_picture_is_encoded_anew(folder, cache):
    assert fill(cache, make_plan(folder))[0] == 3
    assert fill(cache, make_plan(folder), identity="another")[0] == 3
    (folder / "0.png").rename(folder / "renamed.png")
    assert fill(cache, make_plan(folder))[0] == 0, "content counts, not the name"
    Image.fromarray(random_picture(seed=99)).save(folder / "1.png")
    assert fill(cache, make_plan(folder))[0] == 1


def test_each_random_crop_is_kept(tmp_path, cache):
    folder = write_pictures(tmp_path / "p", {"a.png": (SIDE, 4 * SIDE)})
    plan = make_plan(folder, random_crop=True, num_repeats=5)
    calls, store = fill(cache, plan)
    assert calls == 5
    found = {np.array(store.load(entry)["mean"]).tobytes() for entry in entries(plan)}
    assert len(found) == 5
    assert fill(cache, make_plan(folder, random_crop=True, num_repeats=6))[0] == 1
    assert fill(cache, plan, seed=1)[0] == 5


# --- Files ---


def only_file(cache, plan):
    (placed, repeat), *_ = plan.variants()
    return cache.path(latents.Latents(cache, "ae", 0)._key((placed, repeat)))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "nonsense", "another's"])
def test_damaged_files_are_redone(folder, cache, damage):
    plan = make_plan(folder)
    _, store = fill(cache, plan)
    path = only_file(cache, plan)
    good = path.read_bytes()
    other = next(file for file in path.parents[1].rglob("*.safetensors") if file != path)
    flipped = bytearray(good)
    flipped[-5] ^= 1
    bad = {
        "cut": good[:-100],
        "empty": b"",
        "bit": bytes(flipped),
        "nonsense": b"\x00" * 300,
        "another's": other.read_bytes(),
    }
    path.write_bytes(bad[damage])
    with pytest.raises(FluxError, match=r"lost the latents of .*png"):
        [store.load(entry) for entry in entries(plan)]
    assert fill(cache, plan)[0] == 1
    assert path.read_bytes() == good


def test_a_failed_write_leaves_nothing(folder, cache, monkeypatch):
    plan = make_plan(folder)

    def refuse(path, arrays, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mx, "save_safetensors", refuse)
        with pytest.raises(FluxError, match="No space left"):
            fill(cache, plan)
    assert not [path for path in only_file(cache, plan).parents[1].rglob("*") if path.is_file()]
    assert fill(cache, plan)[0] == 3


def test_files_have_the_encoders_types(folder, cache):
    plan = make_plan(folder)
    store = latents.Latents(cache, "ae", 0)

    def half(pixels):
        return tuple(array.astype(mx.bfloat16) for array in encode_picture(pixels))

    for each in store.missing(plan.variants()):
        store.encode(*each, half)
    (entry, *_) = entries(plan)
    assert store.load(entry)["mean"].dtype == mx.bfloat16


def test_identity_sees_files_and_settings(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10_000_000))
    first = latents.identity([tmp_path / "a"], "bfloat16")
    assert latents.identity([tmp_path / "a"], "bfloat16") == first
    assert latents.identity([tmp_path / "a"], "float32") != first
    assert latents.identity([tmp_path / "a", tmp_path / "a"], "bfloat16") != first
    for place in (0, 5_000_000, 9_999_999):
        changed = bytearray(10_000_000)
        changed[place : place + 200_000] = b"\x01" * len(changed[place : place + 200_000])
        (tmp_path / "a").write_bytes(changed)
        assert latents.identity([tmp_path / "a"], "bfloat16") != first
    (tmp_path / "small").write_bytes(b"x")
    assert latents.identity([tmp_path / "small"]) != latents.identity([])


# --- Texts and batches ---


def test_texts_are_encoded_once(cache):
    texts, encode = latents.Texts(cache, "clip t5 512"), Counting(encode_text)
    captions = ["sks toy", "", "Ein „Hund“ 犬"]
    for caption in texts.missing(captions):
        texts.encode(caption, encode)
    assert encode.calls == 3
    assert texts.missing([*captions, "new"]) == ["new"]
    assert latents.Texts(cache, "clip t5 256").missing(captions) == captions
    for caption in captions:
        found, expected = texts.load(caption), encode_text(caption)
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
        assert found["t5"].dtype == mx.bfloat16
    with pytest.raises(FluxError, match="'new'"):
        texts.load("new")


def test_batches_of_arrays(tmp_path, cache):
    write_pictures(tmp_path / "a", {"a.png": (SIDE, SIDE), "b.png": (SIDE, SIDE)})
    write_pictures(tmp_path / "r", {"r.png": (SIDE, SIDE)})
    clear = random_picture(SIDE, SIDE, 5, channels=4)
    clear[..., 3] = 51
    Image.fromarray(clear).save(tmp_path / "a/c.png")
    (tmp_path / "data.toml").write_text(
        """[[datasets]]
resolution = 64
batch_size = 6
alpha_mask = true
[[datasets.subsets]]
image_dir = "a"
class_tokens = "sks toy"
[[datasets.subsets]]
image_dir = "r"
class_tokens = "toy"
is_reg = true
"""
    )
    plan = batches.Plan(samples.load(tmp_path, {}), 0)
    _, store = fill(cache, plan)
    texts = latents.Texts(cache, "t")
    for caption in texts.missing(plan.captions(1)):
        texts.encode(caption, encode_text)
    batch = plan.batch(0)
    arrays = latents.assemble(batch, store, texts, plan.masked)
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {
        "mean": (6, 8, 8, 3),
        "logvar": (6, 8, 8, 3),
        "mask": (6, 8, 8),
        "t5": (6, 2, 2),
        "clip": (6, 2),
        "is_reg": (6,),
    }
    for i, entry in enumerate(batch.entries):
        assert mx.array_equal(arrays["mean"][i], store.load(entry)["mean"])
        assert mx.array_equal(arrays["logvar"][i], store.load(entry)["logvar"])
        assert mx.array_equal(arrays["clip"][i], encode_text(entry.caption)["clip"])
        assert arrays["is_reg"][i].item() == (entry.caption == "toy")
        share = 0.2 if entry.placed.sample.name.endswith("c.png") else 1.0
        assert np.allclose(arrays["mask"][i], share)
    assert arrays["is_reg"].sum().item() == 3


def test_batches_without_masks_have_none(folder, cache):
    plan = make_plan(folder)
    _, store = fill(cache, plan)
    texts = latents.Texts(cache, "t")
    texts.encode("sks toy", encode_text)
    assert "mask" not in latents.assemble(plan.batch(0), store, texts, plan.masked)
    ones = latents.assemble(plan.batch(0), store, texts, masked=True)["mask"]  # as beside a masked subset
    assert ones.shape == (1, 8, 8)
    assert mx.all(ones == 1).item()
