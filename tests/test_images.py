"""Pictures in files and arrays: what comes back is what went in, upright, whole, with its metadata."""

import os

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flux import images
from flux.errors import FluxError


def random_picture(height=12, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_and_its_text_come_back(tmp_path):
    picture = random_picture()
    text = {"prompt": "a “red” apple\n☃ 苹果 🍎", "negative_prompt": "", "seed": "7"}
    images.save(tmp_path / "a.png", picture, text)
    loaded, alpha = images.load(tmp_path / "a.png")
    assert np.array_equal(loaded, picture)
    assert alpha is None
    assert images.read_metadata(tmp_path / "a.png") == text
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp"])
def test_other_formats(tmp_path, name):
    picture = np.full((16, 24, 3), (200, 30, 60), dtype=np.uint8)
    text = {"prompt": "a “red” apple\n☃ 苹果 🍎", "seed": "7"}
    images.save(tmp_path / name, picture, text, "a 苹果 🍎\nSteps: 4")
    loaded, _ = images.load(tmp_path / name)
    assert np.abs(loaded.astype(int) - picture).max() <= 4
    assert images.read_metadata(tmp_path / name) == text
    images.save(tmp_path / name, picture)
    assert images.read_metadata(tmp_path / name) == {}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_other_programs_find_the_parameters(tmp_path, name):
    """Where AUTOMATIC1111 and those after it look: a PNG's text, or EXIF's UserComment in UTF-16."""
    images.save(tmp_path / name, random_picture(), {"prompt": "é 🍎"}, "é 🍎\nSteps: 4")
    with Image.open(tmp_path / name) as image:
        if name == "a.png":
            found = image.text["parameters"]
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            found = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert found == "é 🍎\nSteps: 4"
    assert images.read_metadata(tmp_path / name) == {"prompt": "é 🍎"}


def test_a_recipe_that_is_too_long_for_a_jpeg_is_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"a\.jpg: .*too long for a JPEG"):
        images.save(tmp_path / "a.jpg", random_picture(), {"prompt": "x" * 70_000})
    assert images.read_metadata(tmp_path / "a.jpg") == {}
    images.save(tmp_path / "a.webp", random_picture(), {"prompt": "x" * 70_000})
    assert len(images.read_metadata(tmp_path / "a.webp")["prompt"]) == 70_000


@pytest.mark.parametrize("text", ["a photo", "[1, 2]", '{"a": 5, "b": "c"}', "[" * 100])
def test_descriptions_of_other_programs(tmp_path, text):
    exif = Image.Exif()
    exif[0x010E] = text
    Image.fromarray(random_picture()).save(tmp_path / "a.jpg", exif=exif)
    assert images.read_metadata(tmp_path / "a.jpg") == ({"b": "c"} if "c" in text else {})


def test_saving_replaces_the_old_file_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.save(path, random_picture(seed=1))
    before = path.read_bytes()

    def half(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(FluxError, match=r"a\.png: No space left"):
        images.save(path, random_picture(seed=2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saved_files_have_ordinary_permissions(tmp_path):
    images.save(tmp_path / "a.png", random_picture())
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(random_picture())
    stored = {  # how a camera that notes this orientation stores the upright picture
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = upright
    for operation in stored:
        image = image.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    loaded, _ = images.load(tmp_path / "a.png")
    assert np.array_equal(loaded, np.array(upright))


def test_alpha_is_kept_apart(tmp_path):
    rgba = np.dstack([random_picture(), np.arange(240, dtype=np.uint8).reshape(12, 20)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    loaded, alpha = images.load(tmp_path / "a.png")
    assert np.array_equal(loaded, rgba[..., :3])
    assert np.array_equal(alpha, rgba[..., 3])


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    loaded, alpha = images.load(tmp_path / "a.png")
    assert loaded[1, 1].tolist() == [250, 10, 20]
    assert alpha[0, 0] == 0
    assert alpha[1, 1] == 255


@pytest.mark.parametrize(
    ("mode", "value", "expected"), [("L", 77, 77), ("I;16", 257 * 77, 77), ("1", 1, 255)]
)
def test_grey_pictures_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (5, 3), value).save(tmp_path / "a.png")
    loaded, alpha = images.load(tmp_path / "a.png")
    assert loaded.shape == (3, 5, 3)
    assert (loaded == expected).all()
    assert alpha is None


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(FluxError, match=r"none\.png: No such file"):
        images.load(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(FluxError, match=r"text\.png is not a picture"):
        images.load(tmp_path / "text.png")
    images.save(tmp_path / "cut.png", random_picture(64, 64))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FluxError, match=r"cut\.png"):
        images.load(tmp_path / "cut.png")
    with pytest.raises(FluxError, match=r"cannot read"):
        images.load(tmp_path)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
def test_fit_covers_and_keeps_the_middle(size):
    picture = np.zeros((60, 90, 3), dtype=np.uint8)
    picture[25:35, 40:50] = 255
    fitted = images.fit(picture, size)
    assert fitted.shape == (*size, 3)
    rows, columns = np.nonzero(fitted[..., 0] > 127)
    assert abs(rows.mean() - (size[0] - 1) / 2) < 1
    assert abs(columns.mean() - (size[1] - 1) / 2) < 1
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1  # not stretched


def test_fit_of_the_right_size_changes_nothing():
    picture = random_picture(16, 32)
    assert np.array_equal(images.fit(picture, (16, 32)), picture)


def test_to_uint8_rounds_and_clips():
    x = mx.array([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.7])
    assert images.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert images.to_uint8(x.astype(mx.bfloat16))[-1] == 255
    everything = np.arange(256, dtype=np.uint8)
    assert np.array_equal(images.to_uint8(everything.astype(np.float32) / 255), everything)


def test_grid_goes_row_by_row_and_is_black_where_empty():
    pictures = [np.full((2, 3, 3), i + 1, dtype=np.uint8) for i in range(5)]
    out = images.grid(pictures, rows=2)
    assert out.shape == (4, 9, 3)
    assert out[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert np.array_equal(images.grid(pictures[:1]), pictures[0])


@pytest.mark.parametrize("rows", [0, -1, 3])
def test_grid_refuses_rows_that_cannot_be_filled(rows):
    with pytest.raises(FluxError, match=f"2 picture.*{rows} rows"):
        images.grid([random_picture(), random_picture()], rows)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.gif", "missing/a.png", "folder", "folder.png"])
def test_check_output_names_the_path(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FluxError, match=name.split("/")[0]):
        images.check_output(tmp_path / name)


def test_check_output_accepts_a_good_path_and_writes_nothing(tmp_path, monkeypatch):
    images.check_output(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    images.check_output("a.jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [248, 251, 300, 5000])
def test_a_name_that_is_too_long(tmp_path, length):
    """251 letters and .png would do, but not beside them what it is called until it is whole."""
    with pytest.raises(FluxError, match=r"cannot write .*File name too long"):
        images.check_output(tmp_path / ("a" * length + ".png"))
    assert list(tmp_path.iterdir()) == []


def test_sides_beyond_a_format(tmp_path):
    with pytest.raises(FluxError, match=r"a\.webp: a side can have 16383 pixels at most there, not 64x16384"):
        images.check_output(tmp_path / "a.webp", (64, 16384))
    images.check_output(tmp_path / "a.webp", (16383, 16383))
    images.check_output(tmp_path / "a.png", (64, 100_000))


def test_check_output_where_nobody_can_write():
    with pytest.raises(FluxError, match=r"cannot write /proc/a\.png: No such file"):
        images.check_output("/proc/a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_output_in_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FluxError, match="cannot write"):
        images.check_output(tmp_path / "a.png")


def test_normalize_and_denormalize_are_inverse():
    """uint8 -> -1..1, for numpy and MLX alike, and through 0..1 back to the same numbers."""
    everything = np.arange(256, dtype=np.uint8)
    for pictures in (everything, mx.array(everything)):
        x = images.normalize(pictures)
        assert x.dtype == mx.float32
        assert (x[0].item(), x[255].item()) == (-1, 1)
        assert np.array_equal(images.to_uint8(images.denormalize(x)), everything)
    assert images.denormalize(mx.array([-3.0, 0.0, 3.0], mx.bfloat16)).tolist() == [0, 0.5, 1]


# --- Values of more than 8 bits ---

GREY = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.float32) / 255,
        GREY.astype(np.float32),
        GREY.astype(np.float32) * 257,
        GREY.astype(np.int32),
        GREY.astype(np.int32) * 257,
        GREY.astype(np.uint16) * 257,
    ],
    ids=["0..1", "0..255", "0..65535", "int32", "int32 of 16 bits", "uint16"],
)
def test_greys_of_more_than_8_bits_keep_their_brightness(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    picture, alpha = images.load(tmp_path / "a.tiff")
    assert np.array_equal(picture, np.repeat(GREY[..., None], 3, axis=2))
    assert alpha is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-1, "go from -1 to 0.5"),
        (1e6, r"to 1e\+06"),
    ],
)
def test_greys_that_mean_nothing_are_refused(tmp_path, value, words):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = value
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(FluxError, match=rf"a\.tiff: .*{words}"):
        images.load(tmp_path / "a.tiff")


def test_suffixes():
    assert {
        ".png",
        ".jpg",
        ".jfif",
        ".jpe",
        ".jp2",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
    } <= images.readable_suffixes()
    assert not {".mpg", ".eps", ".pdf", ".txt"} & images.readable_suffixes()
    assert not images.readable_suffixes() & images.unreadable_suffixes()


def test_heic_says_what_it_needs(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    if ".heic" in images.readable_suffixes():
        pytest.skip("pillow-heif is here")
    with pytest.raises(FluxError, match=r"a\.heic is not a picture .*pip install pillow-heif"):
        images.load(tmp_path / "a.heic")


def test_a_reader_beside_never_sees_half_a_picture(tmp_path):
    """The old file stays what it was for whoever has it open: the new one takes its name, not its bytes."""
    path = tmp_path / "a.png"
    images.save(path, random_picture(seed=1))
    before = path.read_bytes()
    os.link(path, tmp_path / "open.png")
    images.save(path, random_picture(seed=2))
    assert (tmp_path / "open.png").read_bytes() == before
    assert path.read_bytes() != before
