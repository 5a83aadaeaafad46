"""Pictures to a training set: python caption.py photos/ --trigger "sks dog" writes photos/train.jsonl."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import flux  # before mlx.core, so that OpenBLAS is there first

# isort: split
from PIL import Image
from tqdm import tqdm

from flux.arguments import Parser, count, run_program
from flux.captioning import files, pictures, records, sheet
from flux.captioning.captioner import Captioner
from flux.captioning.files import Picture
from flux.captioning.tasks import TASKS, Task
from flux.captioning.wording import Wording
from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.outputs import locked
from flux.weights import checkpoints, quantize
from flux.weights.registry import CAPTIONERS

CAPTIONS = ("caption", "detailed", "more_detailed")  # the tasks whose answers are captions
SEVERAL = "With mlx.launch each rank captions its share; all must see the pictures under the same paths."


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(
        lambda ranks: run(ranks.on_all_ranks(lambda: build_parser().parse_intermixed_args()), ranks)
    )


# --- Arguments ---


def words(text: str) -> str:
    """A text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def build_parser() -> Parser:
    """The program's arguments."""
    parser = Parser(description="Caption pictures for a training set, with Florence-2.", epilog=SEVERAL)

    add = parser.add_argument_group("what to caption").add_argument
    add("paths", nargs="+", metavar="PATH", help="folders, with their sub-folders, and single pictures")
    add("--overwrite", action="store_true", help="caption anew what has a caption; else it is kept")
    add("--dry-run", action="store_true", help="only list what would be captioned; writes nothing")

    add = parser.add_argument_group("the model").add_argument
    known = ", ".join(CAPTIONERS)
    add("--model", default="base", help=f"{known}, a folder, a Hub repository (default: base)")
    add("--quantize", type=int, choices=(4, 8), metavar="BITS", help="to 4 or 8 bits a weight")
    add("--batch-size", type=count, default=4, metavar="N", help="pictures at once on each rank (default: 4)")

    group = parser.add_argument_group("what to ask (beams and tokens: where not given, the model's)")
    asked = group.add_mutually_exclusive_group().add_argument
    asked("--task", choices=CAPTIONS, default="caption", help="how long a caption (default: caption)")
    asked("--prompt", type=words, metavar="TEXT", help="ask this instead of one of the tasks")
    add = group.add_argument
    add("--beams", type=count, metavar="N", help="beams of the search; 1 is greedy, and fastest")
    add("--max-tokens", type=count, metavar="N", help="a caption's tokens at most, start and end included")

    add = parser.add_argument_group("the captions: trigger, prefix answer").add_argument
    add("--trigger", default="", metavar="TEXT", help='words to teach, such as "sks dog"; a comma follows')
    add("--prefix", default="", metavar="TEXT", help="what to put before every answer")
    add("--strip", action="append", default=[], type=words, metavar="TEXT", help=STRIP)

    add = parser.add_argument_group("output").add_argument
    add("--format", choices=records.FORMATS, default="jsonl", help=FORMAT)
    add("--contact-sheet", type=Path, metavar="FILE", help="all pictures and captions, as .html or .png")
    add("--version", action="version", version=flux.__version__)
    return parser


STRIP = 'take this off the beginning of answers, such as "The image shows "; may be given again'
FORMAT = "jsonl: train.jsonl in the folder (default); txt: a file beside each picture; csv: captions.csv"


# --- The work ---


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Caption what is to be captioned, and print where the captions are. Returns the exit status."""
    with ranks.in_rank_zero(nullcontext() if args.dry_run else locked_folders(args.paths)):
        return caption_all(args, ranks)


@contextmanager
def locked_folders(paths: list[str]) -> Iterator[None]:
    """The block while no other process writes captions into the folders of these."""
    folders = {files.folder_of(Path(path)).resolve() for path in paths}
    with ExitStack() as stack:
        for folder in sorted(folder for folder in folders if folder.is_dir()):
            stack.enter_context(locked(folder))
        yield


def caption_all(args: argparse.Namespace, ranks: Ranks) -> int:
    """As `run`, in folders that are its alone."""
    # Rank 0 alone looks at the disk: another might look later, when the first captions are written.
    todo, kept, carried = ranks.on_all_ranks(lambda: plan(args) if ranks.rank == 0 else ([], {}, {}))
    todo = [Picture(Path(path), Path(folder), name) for path, folder, name in ranks.gather(as_text(todo))[0]]
    if args.dry_run:
        if ranks.rank == 0:
            print(*(picture.path for picture in todo), sep="\n", end="\n" * bool(todo))
            report(f"{len(todo)} to caption, {len(kept)} captioned already; nothing written")
        return 0
    skipped: dict[str, str] = {}
    ranks.rank_zero_only(partial(records.write, carried, args.format, overwrite=False))
    if todo:
        captioner = ranks.on_all_ranks(lambda: load(args))
        if args.quantize and ranks.is_rank_zero:
            report(f"quantized: {quantize.report(args.quantize, captioner=captioner.model)}")
        skipped = caption(captioner, todo, args, ranks)
    if ranks.rank > 0:
        return 0
    finish(args, [*kept, *todo])
    done = len(todo) - len(skipped)
    report(f"{done} captioned, {len(kept)} kept, {len(skipped)} skipped")
    for fault in skipped.values():
        report(f"skipped: {fault}")
    for path in records.goes_before([*kept, *todo], args.format):
        report(f"{path} is there too, and goes before these captions in training: move it away to use them")
    if not done and not kept:
        raise FluxError("no picture could be captioned")
    return 0


def plan(args: argparse.Namespace) -> tuple[list[Picture], dict[Picture, str], dict[Picture, str]]:
    """What is to be captioned, the captions that stay, and those of them that are in another form so far.

    FluxError for what will not work.
    """
    found = files.find(args.paths, [args.contact_sheet] if args.contact_sheet else [])
    if args.contact_sheet:
        sheet.check(args.contact_sheet, len(found))
    records.check(found, args.format)
    captions = records.read(found, args.format)  # to overwrite too: a damaged list is seen at once
    if args.overwrite:
        return found, {}, {}
    kept = records.read_elsewhere(found) | captions
    carried = {picture: text for picture, text in kept.items() if picture not in captions}
    return [picture for picture in found if picture not in kept], kept, carried


def as_text(pictures: Iterable[Picture]) -> list[tuple[str, str, str]]:
    """Pictures as texts that ranks can send: path, folder and name."""
    return [(str(picture.path), str(picture.folder), picture.name) for picture in pictures]


def load(args: argparse.Namespace) -> Captioner:
    """The captioner, set up as asked."""
    folder = checkpoints.find_captioner(args.model)
    captioner = Captioner.from_folder(folder, checkpoints.default_dtype())
    captioner.search(args.beams, args.max_tokens)
    if args.quantize:
        quantize.quantize(captioner.model, args.quantize)
    return captioner


def caption(
    captioner: Captioner, todo: list[Picture], args: argparse.Namespace, ranks: Ranks
) -> dict[str, str]:
    """Captions the pictures, a batch on each rank at a time, and saves after each.

    Returns what is wrong with those that could not be read, by name.
    """
    task = TASKS["prompt"] if args.prompt else TASKS[args.task]
    wording = Wording(args.trigger, args.prefix, tuple(args.strip))
    skipped: dict[str, str] = {}
    with tqdm(total=len(todo), unit="picture", disable=True if ranks.rank else None) as bar:
        for start in range(0, len(todo), args.batch_size * ranks.size):
            batch = todo[start : start + args.batch_size * ranks.size]
            share = batch[ranks.rank :: ranks.size]
            answered = ranks.on_all_ranks(partial(caption_batch, captioner, share, task, args.prompt))
            gathered = ranks.gather(answered)
            answers = merge(found for found, _ in gathered)
            skipped |= merge(faults for _, faults in gathered)
            captions = {
                picture: wording(answers[str(picture.path)])
                for picture in batch
                if str(picture.path) in answers
            }
            ranks.rank_zero_only(partial(records.write, captions, args.format, args.overwrite))
            bar.update(len(batch))
    return skipped


def merge(dicts: Iterable[dict[str, str]]) -> dict[str, str]:
    """Dictionaries as one."""
    return {key: value for each in dicts for key, value in each.items()}


def caption_batch(
    captioner: Captioner, batch: list[Picture], task: Task, text: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The answers by the pictures' paths, and what is wrong with those that cannot be read."""
    images: dict[str, Image.Image] = {}
    faults: dict[str, str] = {}
    for picture in batch:
        name = str(picture.path)
        try:
            images[name] = pictures.load(picture.path)
            name.encode()
        except FluxError as error:
            faults[name] = str(error)
        except UnicodeEncodeError:
            images.pop(name)
            faults[name] = f"{name!r} has a name that is not UTF-8"
    texts = [text] * len(images) if text else None
    answers = captioner.answers(list(images.values()), task, texts) if images else []
    return {name: str(answer) for name, answer in zip(images, answers, strict=True)}, faults


# --- The end ---


def finish(args: argparse.Namespace, found: list[Picture]) -> None:
    """The contact sheet, and the lines that say where everything is."""
    captions = records.read(found, args.format)
    if args.contact_sheet and captions:
        sheet.save(args.contact_sheet, captions)
        print(args.contact_sheet)
    if args.format == "txt":
        folders = Counter(picture.path.parent for picture in captions)
        print(*(f"{folder}/*.txt" for folder in folders), sep="\n", end="\n" * bool(folders))
    else:
        paths = dict.fromkeys(records.caption_file(picture, args.format) for picture in captions)
        print(*paths, sep="\n", end="\n" * bool(paths))


def report(line: str) -> None:
    """Print a line beside the results, which go to stdout."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
