"""caption.py as a person runs it, without a network; what needs no process of its own is called."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageOps

import caption
from flux.captioning.tasks import TASKS
from flux.recipes import emoji
from flux.weights.registry import TINY_CAPTIONER_FOLDER
from tests import florence2_reference as reference

SCRIPT = Path(caption.__file__)
TOKENS = 14
NAMES = ["0.png", "1.jpg", "3.png", "4.jpg", "6.png", "sub/2.webp", "sub/5.webp"]


@pytest.fixture(scope="module")
def theirs():
    """transformers' model and processor."""
    processor = reference.processor(reference.tokenizer())
    return reference.network(len(processor.tokenizer)), processor


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory) -> str:
    return str(reference.save(tmp_path_factory.mktemp("checkpoint") / "tiny", *theirs))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures, one of them turned by its EXIF, and a broken one."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, picture in enumerate(reference.pictures(7)):
        name = next(name for name in NAMES if Path(name).stem == str(i))
        exif = picture.getexif()
        exif[0x0112] = 6 if i == 1 else 1
        picture.save(folder / name, exif=exif)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, model):
    """Runs the script's main function beside photos/: status, lines of stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, list[str], list[str]]:
        words = list(map(str, args))
        words += [] if "--model" in words else ["--model", model]
        words += [] if "--max-tokens" in words else ["--max-tokens", str(TOKENS)]
        monkeypatch.setattr(sys, "argv", ["caption.py", *words])
        status = caption.main()
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


def captions(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.keys() == {"image", "prompt"} for row in rows)
    found = {row["image"]: row["prompt"] for row in rows}
    assert len(found) == len(rows)
    return found


def expected(theirs, photos: Path, task: str, **settings) -> dict[str, str]:
    """What transformers writes about the pictures, by their names."""
    network, processor = theirs
    images = [ImageOps.exif_transpose(Image.open(photos / name)).convert("RGB") for name in NAMES]
    texts = [TASKS[task].token if task in TASKS else task] * len(images)
    inputs = processor(text=texts, images=images, return_tensors="pt")
    rows = network.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, **settings)
    texts = processor.batch_decode(rows, skip_special_tokens=False)
    cleaned = [re.sub("</?s>|<pad>", "", text) for text in texts]
    return {name: " ".join(text.split()) for name, text in zip(NAMES, cleaned, strict=True)}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def start(command: list, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    options = {"cwd": folder, "env": environment, "capture_output": True, "timeout": 100}
    return subprocess.run(list(map(str, command)), text=True, **options)


def test_a_folder(environment, theirs, model, photos):
    """As a program: the text of transformers, and nothing of the network."""
    options = [
        "--model",
        model,
        "--max-tokens",
        TOKENS,
        "--trigger",
        "sks dog",
        "--contact-sheet",
        "sheet.html",
    ]
    command = [sys.executable, SCRIPT, "photos/", *options]
    run = subprocess.run(
        list(map(str, command)),
        cwd=photos.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "sheet.html\nphotos/train.jsonl\n"
    skipped = "skipped: photos/broken.png is not a picture that Pillow can read"
    assert run.stderr == f"7 captioned, 0 kept, 1 skipped\n{skipped}\n"
    answers = expected(theirs, photos, "caption")
    assert len(set(answers.values())) > 3
    assert captions(photos / "train.jsonl") == {name: f"sks dog, {text}" for name, text in answers.items()}
    assert (photos.parent / "sheet.html").read_text().count("<figure>") == 7
    assert files(photos) == sorted([*NAMES, "broken.png", "train.jsonl"])


def test_what_is_asked_and_how(call, theirs, photos):
    assert call("photos", "--task", "detailed", "--beams", 1, "--batch-size", 3)[0] == 0
    answers = expected(theirs, photos, "detailed", num_beams=1)
    assert captions(photos / "train.jsonl") == answers
    beginning = answers["0.png"][:9].upper()
    more = ("--prefix", "a photo:", "--strip", beginning, "--strip", "none of these", "--overwrite")
    assert call("photos", "--prompt", "What dog?", "--beams", 1, *more)[0] == 0
    stripped = expected(theirs, photos, "What dog?", num_beams=1)
    assert any(text.upper().startswith(beginning) for text in stripped.values())
    for name, text in stripped.items():
        stripped[name] = text[9:].lstrip() if text.upper().startswith(beginning) else text
    assert captions(photos / "train.jsonl") == {name: f"a photo: {text}" for name, text in stripped.items()}


def test_what_is_captioned_stays(call, photos):
    """Resumed, edited by hand, overwritten; and what fails at every run."""
    listing = photos / "train.jsonl"
    assert call("photos/sub", "photos/0.png")[1] == ["photos/sub/train.jsonl", "photos/train.jsonl"]
    assert captions(photos / "sub/train.jsonl").keys() == {"2.webp", "5.webp"}
    listing.write_text('{"image": "0.png", "prompt": "by hand"}\n')
    status, out, err = call("photos", "--dry-run")
    assert (status, len(out)) == (0, 7)
    assert "photos/0.png" not in out
    assert err == ["7 to caption, 1 captioned already; nothing written"]
    status, out, err = call("photos")
    assert (status, out, err[0]) == (0, ["photos/train.jsonl"], "6 captioned, 1 kept, 1 skipped")
    first = captions(listing)
    assert first["0.png"] == "by hand"
    assert sorted(first) == NAMES
    status, out, err = call("photos", "--contact-sheet", "photos/sheet.png")
    assert (status, out) == (0, ["photos/sheet.png", "photos/train.jsonl"])
    assert err[0] == "0 captioned, 7 kept, 1 skipped"
    assert captions(listing) == first
    # The sheet is no picture of the set where it is named again.
    status, _, err = call("photos", "--overwrite", "--contact-sheet", "photos/sheet.png", "--trigger", "x")
    assert (status, err[0]) == (0, "7 captioned, 0 kept, 1 skipped")
    assert all(text.startswith("x, ") for text in captions(listing).values())


def test_other_forms(call, photos):
    assert call("photos", "--format", "csv")[1] == ["photos/captions.csv"]
    status, out, _ = call("photos", "--format", "txt", "--quantize", 8)
    assert (status, out) == (0, ["photos/*.txt", "photos/sub/*.txt"])
    written = [f"{Path(name).with_suffix('.txt')}" for name in NAMES]
    assert files(photos) == sorted([*NAMES, *written, "broken.png", "captions.csv"])
    (photos / "0.txt").write_text("by hand")
    assert call("photos", "--format", "txt")[2][0] == "0 captioned, 7 kept, 1 skipped"
    assert (photos / "0.txt").read_text() == "by hand"


def test_captions_in_another_form_stay(call, photos):
    """What a person wrote for another program is kept, in the form that is asked for."""
    rows = [{"file_name": "0.png", "text": "by hand"}, {"file_name": "sub/2.webp", "text": "by hand, too"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, out, err = call("photos", "--dry-run")
    assert (status, len(out), err) == (0, 6, ["6 to caption, 2 captioned already; nothing written"])
    assert call("photos")[2][0] == "5 captioned, 2 kept, 1 skipped"
    found = captions(photos / "train.jsonl")
    assert (found["0.png"], found["sub/2.webp"]) == ("by hand", "by hand, too")
    assert sorted(found) == NAMES
    (photos / "train.jsonl").unlink()
    err = call("photos", "--format", "txt")[2]
    assert err[-1].startswith("photos/metadata.jsonl is there too, and goes before these captions")
    assert (photos / "0.txt").read_text() == "by hand\n"


def test_killed(environment, model, photos):
    """What was saved before is whole and stays; the next run does the rest."""
    for i in range(30):
        (photos / f"more{i}.png").write_bytes((photos / "0.png").read_bytes())
    command = [sys.executable, SCRIPT, "photos", "--model", model, "--batch-size", 1, "--max-tokens", 150]
    listing = photos / "train.jsonl"
    with subprocess.Popen(list(map(str, command)), cwd=photos.parent, env=environment) as process:
        end = time.monotonic() + 60
        while not listing.exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    first = captions(listing)
    assert 0 < len(first) < 37
    run = start([*command[:-1], 5], photos.parent, environment)
    assert f"{37 - len(first)} captioned, {len(first)} kept, 1 skipped" in run.stderr
    assert {name: captions(listing)[name] for name in first} == first


# Two runs in one process: most of the test's time is that of starting.
TWICE = """
import json, sys
import caption
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    caption.main()
"""


def test_two_ranks(environment, theirs, model, photos):
    """Uneven shares, a broken picture among them: the file of one rank. And an error, said once."""
    good = [str(photos), "--model", model, "--max-tokens", str(TOKENS), "--batch-size", "2"]
    bad = [str(photos), "--model", str(photos), "--overwrite"]
    environment |= {"PYTHONPATH": str(SCRIPT.parent)}  # without the block: ranks meet through sockets
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", 2, "--", sys.executable]
    run = start([*launch, "-c", TWICE, json.dumps([good, bad])], photos.parent, environment)
    assert run.stderr.count("7 captioned, 0 kept, 1 skipped") == 1
    assert run.stdout.strip() == str(photos / "train.jsonl")
    assert list(captions(photos / "train.jsonl").items()) == list(expected(theirs, photos, "caption").items())
    assert run.stderr.count("error: ") == 1
    assert f"error: {photos}: no captioner here" in run.stderr


BAD = [
    ([], "PATH"),
    (["none"], "none: no such file or folder"),
    (["empty"], "empty: no pictures"),
    (["photos", "--task", "od"], "task: .*od"),
    (["photos", "--task", "detailed", "--prompt", "x"], "not allowed with"),
    (["photos", "--prompt", " "], "prompt: must not be empty"),
    (["photos", "--format", "xml"], "format: .*xml"),
    (["photos", "--batch-size", "0"], "batch-size: .*0"),
    (["photos", "--beams", "-1"], "beams: .*-1"),
    (["photos", "--max-tokens", "1"], "answers of 1 tokens"),
    (["photos", "--max-tokens", "201"], "answers of 201 tokens; the captioner writes 200"),
    (["photos", "--prompt", "dog " * 300], "tokens in a sequence; the captioner reads and writes 200"),
    (["photos", "--quantize", "5"], "quantize: .*5"),
    (["photos", "--contact-sheet", "x.pdf"], r"x\.pdf should end in"),
    (["photos", "--contact-sheet", "none/x.html"], "folder none does not exist"),
    (["photos", "--model", "hug"], "hug.*base, large"),
    (["photos", "--model", "base"], "florence-community/Florence-2-base .*HF_HUB_OFFLINE=1"),
    (["photos", "--model", "photos"], "photos: no captioner here"),
    (["photos/0.png", "twin", "--format", "txt"], r"twin/a\.jpg and twin/a\.png would share a\.txt"),
    (["photos", "damaged"], r"damaged/train\.jsonl, line 1: should have"),
    (["photos/broken.png", "empty/notes.txt"], "no picture could be captioned"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_has_one_clear_line_and_writes_nothing(call, photos, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    for name in ("twin/a.png", "twin/a.jpg", "damaged/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "empty/notes.txt").write_text("no picture")
    (tmp_path / "damaged/train.jsonl").write_text("caption\n")
    before = files(tmp_path)
    status, out, err = call(*args)
    assert (status, out) == (2, [])
    errors = [line for line in err if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert len(err) == (4 if "could be" in message else 1)  # then, each file is named
    assert files(tmp_path) == before


def test_help_is_complete(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group in caption.build_parser()._action_groups[2:]:
        assert group.title in text
        for action in group._group_actions:
            assert action.help
            assert (action.option_strings or [action.metavar])[-1] in text


@pytest.mark.skipif(not TINY_CAPTIONER_FOLDER.is_dir(), reason="the built-in captioner is not there yet")
@pytest.mark.skipif(not emoji.FONT.is_file(), reason="needs the font Noto Color Emoji")
def test_the_built_in_captioner_needs_no_network(environment, tmp_path):
    """Rendered pictures, in three sizes and formats: most captions are those that they were drawn from."""
    shown = [c for c in emoji.compositions(True, ["red apple", "banana", "rocket"]) if c.size == "large"][:6]
    (tmp_path / "photos").mkdir()
    for i, composition in enumerate(shown):
        picture = Image.fromarray(emoji.Renderer()(composition)).resize((64 << i % 3, 64 << i % 3))
        picture.save(tmp_path / "photos" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    run = start([sys.executable, SCRIPT, "photos", "--model", "tiny"], tmp_path, environment)
    assert run.returncode == 0, run.stderr
    found = captions(tmp_path / "photos" / "train.jsonl")
    right = [emoji.parse(found[name]) == shown[int(name[0])] for name in found]
    assert len(right) == 6
    assert sum(right) >= 4
