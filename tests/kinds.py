"""Data sets as people have them: how each kind's folder is made, and the captions that its pictures have.

The table is written by hand, apart from the code under test; tests/test_folders.py reads every kind through
fine-tuning, pretraining and captioning.
"""

import csv
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Captions = dict[str, tuple[str, ...]]  # a picture's path from the folder -> its captions
LONG = "First paragraph, with a dog.\n\nSecond paragraph: “sks”, café."


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64), **options) -> None:
    """A picture of noise, (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed + 1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def lines(path: Path, *rows: dict) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table(path: Path, *rows: list[str], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def train_jsonl(folder: Path) -> Captions:
    draw(folder / "a.png")
    draw(folder / "sub/b.jpg", 1)
    lines(
        folder / "train.jsonl",
        {"image": "a.png", "prompt": "x\u2028y"},
        {"image": "sub/b.jpg", "prompt": LONG},
    )
    return {"a.png": ("x\u2028y",), "sub/b.jpg": (LONG,)}


def index_json(folder: Path) -> Captions:
    draw(folder / "a.png")
    write(folder / "index.json", json.dumps({"data": [{"image": "a.png", "text": "the older list"}]}))
    return {"a.png": ("the older list",)}


def imagefolder_jsonl(folder: Path) -> Captions:
    """Hugging Face's, in a train folder, with a test folder that is not trained."""
    draw(folder / "train/a.png")
    draw(folder / "test/b.png", 1)
    lines(folder / "train/metadata.jsonl", {"file_name": "a.png", "text": "imagefolder"})
    lines(folder / "test/metadata.jsonl", {"file_name": "b.png", "text": "not this one"})
    return {"train/a.png": ("imagefolder",)}


def imagefolder_csv(folder: Path) -> Captions:
    draw(folder / "a.png")
    draw(folder / "b.png", 1)
    table(
        folder / "metadata.csv",
        ["file_name", "width", "text"],
        ["a.png", "64", 'one, "two"'],
        ["b.png", "64", LONG],
    )
    return {"a.png": ('one, "two"',), "b.png": (LONG,)}


def imagefolder_parquet(folder: Path) -> Captions:
    import pyarrow
    import pyarrow.parquet

    draw(folder / "a.png")
    columns = {"file_name": ["a.png"], "text": [["one", "two"]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    return {"a.png": ("one", "two")}


def captions_csv(folder: Path) -> Captions:
    """What caption.py --format csv writes."""
    draw(folder / "a.png")
    table(folder / "captions.csv", ["image", "prompt"], ["a.png", "by caption.py"])
    return {"a.png": ("by caption.py",)}


def semicolons(folder: Path) -> Captions:
    """What a spreadsheet writes in Germany, with a byte order mark."""
    draw(folder / "a.png")
    write(folder / "metadata.csv", "\ufefffile_name;caption\r\na.png;ein Hund, der bellt\r\n")
    return {"a.png": ("ein Hund, der bellt",)}


def json_array(folder: Path) -> Captions:
    draw(folder / "a.png")
    write(folder / "train.jsonl", json.dumps([{"image": "a.png", "prompt": "in an array"}], indent=1))
    return {"a.png": ("in an array",)}


def sd_scripts_metadata(folder: Path) -> Captions:
    """finetune/merge_captions_to_metadata.py's: keys without a suffix; caption and tags are joined."""
    draw(folder / "a.png")
    draw(folder / "b.png", 1)
    write(
        folder / "metadata.json",
        json.dumps({"a": {"caption": "a dog", "tags": "sks, grass"}, "b.png": {"tags": "cat"}}),
    )
    return {"a.png": ("a dog, sks, grass",), "b.png": ("cat",)}


def several_captions(folder: Path) -> Captions:
    draw(folder / "a.png")
    lines(folder / "train.jsonl", {"image": "a.png", "prompt": ["a dog", "", "the dog"]})
    return {"a.png": ("a dog", "the dog")}


def other_keys(folder: Path) -> Captions:
    """An empty prompt does not hide the caption; a row without one has that of the file beside."""
    draw(folder / "a.png")
    draw(folder / "b.png", 1)
    write(folder / "b.txt", "from the file")
    rows = (
        {"image_path": "a.png", "prompt": "", "caption": "the real one"},
        {"filename": "b.png", "text": None},
    )
    lines(folder / "train.jsonl", *rows)
    return {"a.png": ("the real one",), "b.png": ("from the file",)}


def windows(folder: Path) -> Captions:
    draw(folder / "img/a.png")
    draw(folder / "b.png", 1)
    rows = ({"image": "img\\a.png", "prompt": "x"}, {"image": "D:\\set\\b.png", "prompt": "y"})
    write(folder / "train.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))
    return {"img/a.png": ("x",), "b.png": ("y",)}


def unicode_names(folder: Path) -> Captions:
    """macOS writes é as two characters; the list, and the caption's file, as one."""
    apart = unicodedata.normalize("NFD", "café.png")
    draw(folder / apart)
    draw(folder / unicodedata.normalize("NFD", "é/ü.png"), 1)
    write(folder / "café.txt", "in a file")
    write(folder / unicodedata.normalize("NFD", "é") / "ü.txt", "in a folder")
    return {apart: ("in a file",), unicodedata.normalize("NFD", "é/ü.png"): ("in a folder",)}


def unicode_list(folder: Path) -> Captions:
    apart = unicodedata.normalize("NFD", "é/ü.png")
    draw(folder / apart)
    lines(folder / "metadata.jsonl", {"file_name": "é/ü.png", "text": "x"})
    return {apart: ("x",)}


def caption_files(folder: Path) -> Captions:
    found: Captions = {}
    texts = {
        "a.txt": ("utf-8", LONG),
        "b.caption": ("utf-8-sig", "with a mark"),
        "c.json": ("utf-8", '{"caption": "in JSON", "score": 1}'),
        "d.TXT": ("utf-8", "in capitals"),
        "e.png.txt": ("utf-8", "after the suffix"),
        "f.txt": ("utf-16", "16 bits: ’"),
        "dots.v1.txt": ("utf-8", "with a point"),
    }
    for i, (name, (encoding, text)) in enumerate(texts.items()):
        stem = (
            name.removesuffix(".txt").removesuffix(".png") if name == "e.png.txt" else name.rsplit(".", 1)[0]
        )
        draw(folder / f"{stem}.png", i)
        write(folder / name, text + "\r\n", encoding)
        found[f"{stem}.png"] = ("in JSON" if name == "c.json" else text,)
    for name in ("._a.png", ".hidden.png"):
        write(folder / name, "\0\5\26\7")
    return found


def two_files_each(folder: Path) -> Captions:
    """.caption goes before .txt, unless it is empty."""
    for i, stem in enumerate("ab"):
        draw(folder / f"{stem}.png", i)
        write(folder / f"{stem}.txt", "from txt")
    write(folder / "a.caption", "from caption")
    write(folder / "b.caption", "")
    return {"a.png": ("from caption",), "b.png": ("from txt",)}


def sub_folders(folder: Path) -> Captions:
    """What caption.py --format txt writes for folders in folders."""
    for i, name in enumerate(("a", "one/b", "one/two/c")):
        draw(folder / f"{name}.webp", i)
        write(folder / f"{name}.txt", name)
    return {f"{name}.webp": (name,) for name in ("a", "one/b", "one/two/c")}


def kohya(folder: Path) -> Captions:
    """Repeats and class words in the names; a caption's file goes before the class."""
    draw(folder / "img/10_sks dog/a.png")
    draw(folder / "img/10_sks dog/b.png", 1)
    write(folder / "img/10_sks dog/b.txt", "sks dog in the rain")
    draw(folder / "img/2_cat/c.png", 2)
    return {
        "img/10_sks dog/a.png": ("sks dog",),
        "img/10_sks dog/b.png": ("sks dog in the rain",),
        "img/2_cat/c.png": ("cat",),
    }


def formats(folder: Path) -> Captions:
    """Every suffix that Pillow reads here, one picture each."""
    names = ["a.jfif", "b.jpe", "c.jp2", "d.bmp", "e.gif", "f.tif", "g.TIFF", "h.webp", "i.JPEG"]
    names += ["j.avif"] if ".avif" in Image.registered_extensions() else []
    for i, name in enumerate(names):
        draw(folder / name, i, **({"format": "JPEG"} if name.endswith(("jfif", "jpe")) else {}))
        write(folder / f"{name.split('.')[0]}.txt", name)
    return {name: (name,) for name in names}


KINDS: tuple[Callable[[Path], Captions], ...] = (
    *(train_jsonl, index_json, imagefolder_jsonl, imagefolder_csv, imagefolder_parquet, captions_csv),
    *(semicolons, json_array, sd_scripts_metadata, several_captions, other_keys, windows, unicode_names),
    *(unicode_list, caption_files, two_files_each, sub_folders, kohya, formats),
)
