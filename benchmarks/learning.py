"""Does fine-tuning teach a subject? One that the built-in model never saw, from five pictures of it.

    python -m benchmarks.learning [--subject "teddy bear"] [--quantize 4] [--json FILE]

The pictures are renderings on five of the ten backgrounds, each in another place, captioned with a trigger
word. Asked for is then the subject on the other five backgrounds, in all places and both sizes; and before and
after, held-out prompts of the subjects that the model knows. `flux.training.pretrain.evaluate` is the judge.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import flux  # noqa: F401  (before mlx.core, so that OpenBLAS is there first)

# isort: split
from PIL import Image

from flux.pipeline import FluxPipeline
from flux.training.finetune import FineTuning, Options
from flux.training.pretrain.emoji import COLOURS, PLACES, SIZES, Composition, Renderer, captions
from flux.training.pretrain.evaluate import Share, draw, held_out_prompts, judge

HELD_OUT = 10  # the last subjects of the table are in no training
SHOWN = tuple(COLOURS)[::2]  # the backgrounds of the pictures to learn from
TRIGGER = "sks"  # a word that the model knows nothing of
SETTINGS = {
    "model": "tiny",
    "iterations": 400,
    "rank": 16,
    "learning_rate": 1e-3,
    "data_options": {"batch_size": 5},
}


def lessons(subject: str) -> list[tuple[Composition, str]]:
    """Five pictures of a subject, each on another background and in another place, with captions."""
    sizes = ("large", "small")
    shown = [
        Composition((subject,), colour, sizes[i % 2], place)
        for i, (colour, place) in enumerate(zip(SHOWN, PLACES, strict=True))
    ]
    return [(composition, caption(composition)) for composition in shown]


def caption(composition: Composition) -> str:
    """The plainest one, with the trigger in the subject's place."""
    return captions(composition)[0].replace(composition.subjects[0], TRIGGER)


def questions(subject: str) -> list[tuple[Composition, str]]:
    """The subject on backgrounds that no lesson has, in all places and sizes: 50."""
    asked = [
        Composition((subject,), colour, size, place)
        for colour in COLOURS
        if colour not in SHOWN
        for size in SIZES
        for place in PLACES
    ]
    return [(composition, caption(composition)) for composition in asked]


def write(folder: Path, rows: list[tuple[Composition, str]]) -> Path:
    """A data set that dreambooth.py reads: pictures and train.jsonl."""
    render = Renderer()
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i, (composition, caption) in enumerate(rows):
            Image.fromarray(render(composition)).save(folder / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "prompt": caption}) + "\n")
    return folder


def right(pipeline: FluxPipeline, asked: list[tuple[Composition, str]]) -> dict[str, Share]:
    """How many pictures of these prompts show what they say."""
    shown, prompts = zip(*asked, strict=True)
    pictures, _ = draw(pipeline, prompts)
    return judge(pictures, shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", default="teddy bear", help="one of the last ten of subjects.tsv")
    parser.add_argument("--quantize", choices=("8", "4", "mxfp4"), help="QLoRA")
    parser.add_argument("--count", type=int, default=40, help="prompts of known subjects (default 40)")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=JSON", help="of the training")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    args = parser.parse_args()
    settings = SETTINGS | {"quantize": args.quantize}
    settings |= {name: json.loads(value) for name, value in (text.split("=", 1) for text in args.set)}
    folder = args.folder or Path(tempfile.mkdtemp())
    data = write(folder / "pictures", lessons(args.subject))
    asked, known = questions(args.subject), held_out_prompts(args.count)
    start = time.perf_counter()
    run = FineTuning(Options(data=str(data), output_dir=str(folder / "output"), **settings), quiet=True)
    path = run.execute()
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    bits = int(args.quantize) if args.quantize in ("4", "8") else None
    for label, files in (("before", ()), ("after", ((str(path), 1.0),))):
        pipeline = FluxPipeline("tiny", bits=bits, adapters=files)
        for what, prompts in ((args.subject, asked), ("known subjects", known)):
            shares = right(pipeline, prompts)
            print(label, what, {name: str(share) for name, share in shares.items()}, flush=True)


if __name__ == "__main__":
    main()
