"""The captioning script's helpers: which pictures, where captions go and stay, their wording, the sheet."""

import base64
import io
import json
import os
import re
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from PIL import Image

from flux.captioning import files, pictures, records, sheet
from flux.captioning.captioner import Captioner
from flux.captioning.wording import Wording
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.models.florence2 import Florence2, Florence2Params, GenerationParams, LanguageParams, VisionParams
from flux.preprocessing import PictureParams
from flux.weights import checkpoints, quantize, registry


def draw(path: Path, colour: object = "red", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "sub/deep/d.bmp", ".hidden/e.png", ".f.png", "g.gif"):
        draw(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    (tmp_path / "photos/film.mpg").write_bytes(b"no picture")
    (tmp_path / "photos/iphone.heic").write_bytes(b"a picture, for others")
    return Path("photos")


def names(found: list[files.Picture]) -> list[str]:
    return [f"{picture.folder}: {picture.name}" for picture in found]


ALL = ["a.jpg", "b.PNG", "g.gif", "iphone.heic", "sub/c.webp", "sub/deep/d.bmp"]


def test_which_pictures(folder: Path):
    whole = [f"photos: {name}" for name in ALL]
    assert names(files.find([folder])) == whole
    assert names(files.find([folder, "photos/sub", "./photos/a.jpg"])) == whole  # each once
    assert names(files.find(["photos/sub/c.webp", folder]))[0] == "photos/sub: c.webp"
    assert names(files.find([folder], [Path("photos/a.jpg").resolve()])) == whole[1:]
    assert names(files.find(["photos/notes.txt"])) == ["photos: notes.txt"]  # asked for: it is tried
    os.chdir(folder)
    assert names(files.find(["."])) == [f".: {name}" for name in ALL]


def test_no_pictures(folder: Path):
    (folder / "empty/.hidden").mkdir(parents=True)
    with pytest.raises(FluxError, match="photos/empty: no pictures"):
        files.find([folder / "empty"])
    with pytest.raises(FluxError, match="photos/none: no such file or folder"):
        files.find([folder, folder / "none"])


# --- Captions on the disk ---


@pytest.mark.parametrize("format", records.FORMATS)
def test_what_is_captioned_stays(folder: Path, format: str):
    found = files.find([folder])
    first = {found[0]: 'a "dog", 犬', found[4]: "two\u2028lines"}
    assert records.read(found, format) == {}
    records.write(first, format, overwrite=False)
    assert records.read(found, format) == first
    more = {picture: f"new {picture.name}" for picture in found}
    records.write(more, format, overwrite=False)
    assert records.read(found, format) == more | first
    records.write({found[4]: "cha\u2028nged"}, format, overwrite=True)
    assert records.read(found, format) == more | first | {found[4]: "cha\u2028nged"}
    if format == "jsonl":  # many readers cut lines at U+2028 too
        lines = (folder / "train.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines][:1] == [first[found[0]]]
        assert len(lines) == 6
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith(".part")]
    assert len(left) == 10 + (6 if format == "txt" else 1)


def test_lists_edited_by_hand(folder: Path):
    """Other values, other pictures, other spellings, order, and an edit between two batches."""
    rows = [
        {"image": "./sub/c.webp", "prompt": "mine", "weight": 2},
        {"image": "gone.png", "prompt": "", "n": [1]},
        {"image": "a.jpg", "prompt": "é"},
        {"image": "a.jpg", "prompt": "again"},
    ]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "train.jsonl").write_bytes(text.encode())
    found = files.find([folder])
    kept = records.read(found, "jsonl")
    assert {picture.name for picture in kept} == {"sub/c.webp", "a.jpg"}
    records.write({found[1]: "new"}, "jsonl", overwrite=False)
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("mine", "edited"))
    records.write({found[2]: "newer", found[4]: "not this"}, "jsonl", overwrite=False)
    rows[0]["prompt"] = "edited"
    rows += [{"image": "b.PNG", "prompt": "new"}, {"image": "g.gif", "prompt": "newer"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    records.write({found[4]: "this"}, "jsonl", overwrite=True)
    rows[0]["prompt"] = "this"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_tables_edited_by_hand(folder: Path):
    path = folder / "captions.csv"
    path.write_bytes('\ufeffimage,by,prompt\r\na.jpg,me,"one, two\r\nthree"\r\n'.encode())
    found = files.find([folder])
    records.write({found[0]: "not this", found[1]: 'a "b"'}, "csv", overwrite=False)
    assert records.read(found, "csv") == {found[0]: "one, two\r\nthree", found[1]: 'a "b"'}
    assert path.read_bytes() == b'image,by,prompt\na.jpg,me,"one, two\r\nthree"\nb.PNG,,"a ""b"""\n'


@pytest.mark.parametrize(
    ("format", "content", "words"),
    [
        ("jsonl", b'{"image": "a", "prompt": "b"}\n\n{"image": "a.jpg"', "train.jsonl, line 3: should have"),
        ("jsonl", b'["image"]', "entry 1: should have an image and a prompt"),
        ("jsonl", b'{"prompt": "b"}', "line 1: should have"),
        ("jsonl", b'{"image": "a.jpg", "prompt": 3}', "line 1"),
        ("jsonl", b"\xff\xfd", "train.jsonl: .* not UTF-8"),
        ("csv", b"name;text\na.jpg;b\n", "captions.csv: its first line should name the columns"),
        ("csv", b"image,prompt\na.jpg,b,c\n", "line 2"),
        ("csv", b'image,prompt\na.jpg,"b\n', "captions.csv, line 2: cannot be read as CSV"),
    ],
)
def test_damaged_lists(folder: Path, format: str, content: bytes, words: str):
    path = folder / records.LISTS[format]
    path.write_bytes(content)
    found = files.find([folder])
    for action in (
        lambda: records.read(found, format),
        lambda: records.write({found[0]: "x"}, format, overwrite=True),
    ):
        with pytest.raises(FluxError, match=words):
            action()
    assert path.read_bytes() == content


def test_where_captions_cannot_go(folder: Path):
    draw(folder / "a.png")
    found = files.find([folder])
    records.check(found, "jsonl")
    with pytest.raises(FluxError, match=r"photos/a\.jpg and photos/a\.png would share a\.txt"):
        records.check(found, "txt")
    (folder / "train.jsonl").mkdir()
    with pytest.raises(FluxError, match=r"train\.jsonl: cannot be read: Is a directory"):
        records.read(found, "jsonl")
    with pytest.raises(FluxError, match=r"cannot write photos/none/x\.txt: No such file"):
        records.write({files.Picture(folder / "none/x.png", folder, "none/x.png"): "x"}, "txt", False)


@pytest.mark.parametrize("format", records.FORMATS)
def test_a_reader_beside_never_sees_half_a_list(folder: Path, format: str):
    """The old file stays what it was for whoever has it open."""
    found = files.find([folder])
    records.write({found[0]: "old"}, format, overwrite=False)
    path = records.caption_file(found[0], format)
    before = path.read_bytes()
    os.link(path, folder / "open")
    records.write({found[0]: "new, and longer"}, format, overwrite=True)
    assert (folder / "open").read_bytes() == before
    assert b"new, and longer" in path.read_bytes()


def test_rows_under_other_keys_are_read_and_kept(folder: Path):
    """The keys that the trainer takes: no second row for the same picture, no second caption in a row."""
    rows = [
        {"file_name": "a.jpg", "text": "by hand"},
        {"filename": "sub\\c.webp", "caption": ["one", "two"]},
        {"image_path": "b.PNG", "text": None},
        {"file_name": "g.gif"},
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {picture.name: picture for picture in files.find([folder])}
    assert records.read(found.values(), "jsonl") == {found["a.jpg"]: "by hand", found["sub/c.webp"]: "one"}
    new = {found[name]: f"new {name}" for name in ("a.jpg", "b.PNG", "g.gif", "sub/c.webp")}
    records.write(new, "jsonl", overwrite=False)
    rows[2]["text"], rows[3]["prompt"] = "new b.PNG", "new g.gif"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    records.write(new, "jsonl", overwrite=True)
    assert records.read(found.values(), "jsonl") == new


def test_an_empty_caption_file_is_filled(folder: Path):
    found = files.find([folder])
    (folder / "a.txt").write_text(" \n")
    assert records.read(found, "txt") == {}
    records.write({found[0]: "new"}, "txt", overwrite=False)
    records.write({found[0]: "newer"}, "txt", overwrite=False)
    assert (folder / "a.txt").read_text() == "new\n"


def test_captions_in_another_form_are_found_and_named(folder: Path):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "by hand"}\n')
    found = files.find([folder])
    assert records.read(found, "jsonl") == {}
    assert records.read_elsewhere(found) == {found[0]: "by hand"}
    assert records.goes_before(found, "jsonl") == []
    for format in ("txt", "csv"):
        assert records.goes_before(found, format) == [folder / "metadata.jsonl"]


# --- Wording, pictures, the sheet ---


def test_wording():
    assert Wording()(" a\n dog\u2028 here ") == "a dog here"
    whole = Wording("sks dog ", " A photo of", ("The image shows ", "a "))
    assert whole("the Image shows a dog") == "sks dog, A photo of dog"
    assert whole("This is what the image shows ") == "sks dog, A photo of This is what the image shows"
    assert whole("") == "sks dog, A photo of"
    assert Wording("sks")("The image shows") == "sks, The image shows"
    assert Wording("sks")("") == "sks"


def test_pictures_are_upright_and_over_white(tmp_path: Path):
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert pictures.load(tmp_path / "turned.png").size == (2, 4)
    loaded = pictures.load(draw(tmp_path / "clear.png", (0, 0, 0, 0), "RGBA"))
    assert (np.array(loaded) == 255).all()
    assert loaded.mode == pictures.load(draw(tmp_path / "grey.png", 7, "L")).mode == "RGB"


@pytest.mark.parametrize("suffix", sheet.SUFFIXES)
def test_contact_sheet(folder: Path, suffix: str, tmp_path: Path):
    captions = dict.fromkeys(files.find([folder]), 'a <b>red</b> & "long" caption, 猫, ' * 30)
    path = tmp_path / f"sheet{suffix}"
    sheet.check(path, len(captions))
    sheet.save(path, captions)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    if suffix == ".png":
        pixels = np.array(Image.open(path))
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 50)
        assert red.sum() == 5 * 8 * 6  # the heic is left out
        assert (pixels.max(-1) < 60).sum() > 1000  # letters
        return
    text = path.read_text()
    assert text.count("<figure>") == 5
    assert "<b>red" not in text
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; &quot;long&quot; caption, 猫" in text
    assert "photos/sub/c.webp" in text
    data = re.search(r"base64,([^\"]+)", text)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 6)


def test_sheets_that_cannot_be(tmp_path: Path):
    (tmp_path / "x.html").mkdir()
    for name, count, words in (
        ("sheet.pdf", 1, "should end in .html or .png"),
        ("sheet.png", 401, "401 pictures is too much"),
        ("none/sheet.html", 1, "folder .*none does not exist"),
        ("x.html", 1, "is a folder"),
    ):
        with pytest.raises(FluxError, match=words):
            sheet.check(tmp_path / name, count)
    sheet.check(tmp_path / "sheet.html", 100000)


def test_ranks_alone():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.gather({"a": 1})) == (0, 1, [{"a": 1}])
    assert ranks.on_all_ranks(lambda: 5) == 5
    with pytest.raises(FluxError, match="so"):
        ranks.on_all_ranks(lambda: (_ for _ in ()).throw(FluxError("so")))


# --- The captioner: found, searched, quantized ---


class Hub:
    """Stands for the Hub: a repository with these files, of which `folder` is the snapshot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], folder: Path):
        self.patterns, self.names, self.repo = None, names, None
        monkeypatch.setattr(checkpoints, "_list_files", self.files_of)
        monkeypatch.setattr(checkpoints, "_check_disk", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        self.folder = folder

    def files_of(self, repo: str) -> dict[str, int] | None:
        self.repo = repo
        return None if self.names is None else dict.fromkeys(self.names, 1)

    def download(self, repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert local_files_only == (self.names is None)
        self.patterns = allow_patterns
        return str(self.folder)


SMALL = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]


@pytest.mark.parametrize("weights", [["model.safetensors"], ["pytorch_model.bin"]])
def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path: Path, weights: list[str]):
    unused = ["README.md", "modeling_florence2.py", "tokenizer_config.json"]
    other = ["pytorch_model.bin"] if weights == ["model.safetensors"] else []
    hub = Hub(monkeypatch, [*SMALL, *weights, *unused[:2], *other], tmp_path)
    assert checkpoints.find_captioner("large-ft") == tmp_path
    assert hub.repo == "florence-community/Florence-2-large-ft"
    wanted = huggingface_hub.utils.filter_repo_objects(hub.names, allow_patterns=hub.patterns)
    assert sorted(wanted) == sorted([*SMALL, *weights])


def test_the_built_in_captioner_asks_no_hub(monkeypatch, tmp_path: Path):
    hub = Hub(monkeypatch, SMALL, tmp_path)
    assert checkpoints.find_captioner("tiny") == registry.TINY_CAPTIONER_FOLDER
    assert hub.repo is None


def test_captioners_that_are_not_there(monkeypatch, tmp_path: Path):
    assert checkpoints.find_captioner(str(tmp_path)) == tmp_path
    Hub(monkeypatch, SMALL, tmp_path)
    with pytest.raises(FluxError, match=r"someone/x: no captioner there; expected model\*\.safetensors or"):
        checkpoints.find_captioner("someone/x")
    Hub(monkeypatch, None, tmp_path)
    with pytest.raises(FluxError, match=r"no captioner here; .*\(HF_HUB_OFFLINE=1 forbids .* --model tiny"):
        checkpoints.find_captioner("base")
    (tmp_path / "model.safetensors").touch()
    assert checkpoints.find_captioner("base") == tmp_path
    (tmp_path / "a.bin").touch()
    for name in ("huge", str(tmp_path / "a.bin"), "a/../b"):
        with pytest.raises(FluxError, match=r"is neither a captioner .base, large, base-ft, large-ft, tiny"):
            checkpoints.find_captioner(name)


def captioner() -> Captioner:
    shape = Florence2Params(
        VisionParams(embed_dim=(32, 64, 64, 64), depths=(1,) * 4, num_heads=(2,) * 4, num_groups=(2,) * 4),
        LanguageParams(60, 64, 1, 1, 2, 2, 128, 128, max_position_embeddings=30),
    )
    mx.random.seed(0)
    return Captioner(Florence2(shape), None, PictureParams(), GenerationParams())


def test_search():
    own = captioner()
    own.search()
    assert own.generation == GenerationParams(max_new_tokens=30)  # what it can write
    own.search(beams=1, max_tokens=9)
    assert own.generation == GenerationParams(1, max_new_tokens=9)
    with pytest.raises(FluxError, match="answers of 31 tokens; the captioner writes 30 at most"):
        own.search(max_tokens=31)


def test_quantized_layers():
    """Blocks alone: the embedding is the output layer too, and the projector joins the two networks."""
    x = mx.random.normal((1, 64, 64, 3), key=mx.random.key(0))
    tokens = mx.array([[0, 5, 2]])
    errors = {}
    for bits in (4, 8):
        model = captioner().model
        exact = model(x, tokens, tokens)
        layers = {name: type(layer) for name, layer in model.named_modules() if hasattr(layer, "weight")}
        quantize.quantize(model, bits)
        after = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
        changed = {name for name, layer in after.items() if isinstance(layer, nn.QuantizedLinear)}
        plain = {name for name, kind in layers.items() if kind is nn.Linear} - changed
        assert plain == {"multi_modal_projector.image_projection"}
        assert len(changed) == 4 * 8 + 6 + 10  # the four stages, encoder, decoder
        narrow = {after[name].group_size for name in changed if name.startswith("vision_tower.blocks.0.")}
        assert narrow == {32, 64}  # stage 0 is 32 wide: 64 does not divide it
        errors[bits] = (mx.linalg.norm(model(x, tokens, tokens) - exact) / mx.linalg.norm(exact)).item()
    assert 0 < errors[8] < errors[4] / 8
    assert errors[4] < 0.2
