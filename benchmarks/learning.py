"""Does fine-tuning teach a subject? One that the built-in model never saw, from five pictures of it.

    python -m benchmarks.learning [--subject "teddy bear" tent] [--quantize 4] [--formats] [--folder DIR]

The pictures are renderings on five of the ten backgrounds, each in another place, captioned with a trigger
word. Asked for is then the subject on the other five backgrounds, in all places and both sizes; and before
and after, for held-out prompts of subjects that the model knows. `recipes.tiny.evaluate` judges the pictures.

The adapter changes CLIP too. Without that the subject takes on the colour of backgrounds that it never
had: of teddy bears 76 to 80 % were recognised, with CLIP all (200 to 250 iterations, 25 prompts).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import flux  # noqa: F401  (before mlx.core, so that OpenBLAS is there first)

# isort: split
import numpy as np
from PIL import Image

from flux import adapters
from flux.adapters.writers import WRITERS
from flux.evaluation.proportion import Proportion
from flux.pipeline import FluxPipeline
from flux.recipes.emoji import COLOURS, PLACES, SIZES, Composition, Renderer, captions, subjects
from flux.recipes.tiny.evaluate import draw, held_out_prompts, judge
from flux.recipes.tiny.recipe import SUBJECTS
from flux.training.finetune import Options, begin, finetune

Asked = list[tuple[Composition, str]]  # what a picture should show, and the prompt that says so

SHOWN = tuple(COLOURS)[::2]  # the backgrounds of the pictures to learn from
TRIGGER = "sks"  # a word that the model knows nothing of
REGULAR = 30  # pictures of known subjects, so that these are not forgotten
SETTINGS = {"iterations": 250, "rank": 16, "learning_rate": 4e-3, "schedule": "cosine"}
SETTINGS |= {"train_clip": True, "time_sampling": "shift"}  # as the built-in model was trained
BATCH = 5


def lessons(subject: str) -> Asked:
    """Five pictures of a subject, each on another background and in another place."""
    sizes = ("large", "small")
    return [
        asked(subject, colour, sizes[i % 2], place)
        for i, (colour, place) in enumerate(zip(SHOWN, PLACES, strict=True))
    ]


def questions(subject: str) -> Asked:
    """The subject on the backgrounds that no lesson has, in all places and sizes: 50."""
    others = [colour for colour in COLOURS if colour not in SHOWN]
    return [asked(subject, c, size, place) for c in others for size in SIZES for place in PLACES]


def asked(subject: str, colour: str, size: str, place: str) -> tuple[Composition, str]:
    """With the plainest caption, where the trigger stands for the subject's name."""
    composition = Composition((subject,), colour, size, place)
    return composition, captions(composition)[0].replace(subject, TRIGGER)


def regular(count: int = REGULAR) -> Asked:
    """Known subjects for prior preservation: compositions that the model may have been trained on."""
    rng = np.random.default_rng(0)
    known = [str(name) for name in rng.permutation(list(subjects())[:SUBJECTS])]
    out = []
    for i in range(count):
        size, place = ("large", "small")[i % 2], PLACES[i % len(PLACES)]
        shown = [Composition((known[i % len(known)],), colour, size, place) for colour in COLOURS]
        shown = [composition for composition in shown if not composition.held_out]
        composition = shown[int(rng.integers(len(shown)))]
        out.append((composition, captions(composition)[0]))
    return out


def write(folder: Path, subject: str) -> Path:
    """A data.toml with the lessons and the pictures for prior preservation."""
    toml = f"[[datasets]]\nresolution = 64\nbatch_size = {BATCH}\n"
    for name, rows in (("subject", lessons(subject)), ("others", regular())):
        _write_pictures(folder / name, rows)
        repeats = REGULAR // 5 if name == "subject" else 1
        toml += f"[[datasets.subsets]]\nimage_dir = '{name}'\nnum_repeats = {repeats}\n"
        toml += f"is_reg = {str(name == 'others').lower()}\n"
    (folder / "data.toml").write_text(toml, encoding="utf-8")
    return folder / "data.toml"


def _write_pictures(folder: Path, rows: Asked) -> None:
    render = Renderer()
    folder.mkdir(parents=True)
    for i, (composition, caption) in enumerate(rows):
        Image.fromarray(render(composition)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption, encoding="utf-8")


def train(folder: Path, subject: str, **settings: Any) -> Path:
    """The adapter's file."""
    data = write(folder / "data", subject)
    options = {"data": str(data), "output_dir": str(folder / "run"), **SETTINGS, **settings}
    return finetune(begin(Options(**options)), quiet=True).path


def right(pipeline: FluxPipeline, prompts: Asked) -> dict[str, Proportion]:
    """How many pictures of these prompts show what they say: subject, background, place."""
    shown, texts = zip(*prompts, strict=True)
    return judge(draw(pipeline, texts)[0], shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    unknown = list(subjects())[SUBJECTS:]
    parser.add_argument("--subject", nargs="+", choices=unknown, default=["teddy bear"], metavar="NAME",
        help=f"one or more of {', '.join(unknown)} (default teddy bear)")  # fmt: skip
    parser.add_argument(
        "--model", default="tiny", help="default: the built-in one; a folder with one like it"
    )
    parser.add_argument("--quantize", choices=("8", "4"), help="QLoRA, and pictures of a quantized model")
    parser.add_argument("--formats", action="store_true", help="also after a round trip through each format")
    parser.add_argument("--count", type=int, default=60, help="prompts of known subjects (default 60)")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=JSON", help="of the training")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    settings = {name: json.loads(value) for name, value in (text.split("=", 1) for text in args.set)}
    settings |= {"model": args.model, "quantize": args.quantize}
    known, bits = held_out_prompts(args.count), args.quantize and int(args.quantize)

    def report(label: str, groups: dict[str, Asked], files: list[Path]) -> None:
        pipeline = FluxPipeline(args.model, bits=bits, adapters=[(file, 1.0) for file in files])
        for what, prompts in groups.items():
            shares = right(pipeline, prompts)
            text = ", ".join(f"{name} {share.right}/{share.total}" for name, share in shares.items())
            print(f"{label}: {what}: {text}", flush=True)

    report("before", {subject: questions(subject) for subject in args.subject} | {"known": known}, [])
    for subject in args.subject:
        run = folder / subject.replace(" ", "_")
        start, cpu = time.perf_counter(), time.process_time()
        path = train(run, subject, **settings)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{subject}: learned in {seconds:.0f} s, {cpu:.0f} s of CPU", flush=True)
        report("after", {subject: questions(subject), "known": known}, [path])
        for name in WRITERS if args.formats else ():
            file = run / f"{name}.safetensors"
            adapters.save(file, adapters.load(path), name)
            report(f"after, as {name}", {subject: questions(subject)}, [file])


if __name__ == "__main__":
    main()
