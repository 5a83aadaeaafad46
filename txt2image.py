"""Text to pictures: python txt2image.py --model tiny "a red apple on a blue background"."""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import flux  # before mlx.core, so that OpenBLAS is there first

# isort: split
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux import FluxPipeline, images, sampler
from flux.arguments import Parser, adapter, count, finite, size
from flux.distributed.ranks import DOWNLOAD, PATIENCE, Ranks, print_error
from flux.errors import FluxError
from flux.pipeline import Conditioning, Plan, check_sampling
from flux.weights import tensors

PARTS = ("transformer", "ae", "clip", "t5")
# The options that make a picture what it is: written into it, read again by --remake. Prompts come beside.
RECIPE = (
    *("model", *PARTS, "dtype", "quantize", "adapter", "fuse_adapter", "no_t5_padding", "negative_prompt"),
    *("cfg_scale", "guidance", "steps", "image_size", "seed", "n_images", "n_rows", "decoding_batch_size"),
)
FLAGS = ("fuse_adapter", "no_t5_padding")
PROGRAM = "flux-mlx"
SEVERAL = (
    "With mlx.launch the ranks share out the pictures; where there are fewer pictures than ranks, each has a "
    "part of the model instead, of its attention heads. All need the model under the same path; rank 0 alone "
    "reads prompts and writes."
)
# Up to so many prompts, their modulation takes less memory than the weights that it is made with.
MAX_PLANS = 16


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    ranks = None
    try:
        ranks = Ranks()
        ranks.silence_other_ranks()
        # Rank 0 alone needs the files that the arguments are read from, and a place to write.
        args = argparse.Namespace(**ranks.broadcast_result(lambda: vars(parse(sys.argv[1:]))))
        with ranks.waiting(None):
            run(args, ranks)
            ranks.barrier()  # until rank 0 has written everything
    except FluxError as error:
        print_error(error, ranks)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Make the pictures that the arguments ask for, and print where they are."""
    ranks.model_parallel = ranks.size > 1 and (
        args.force_shard or len(args.prompts) * args.n_images < ranks.size
    )
    stages = Stages(args.verbose and ranks.is_rank_zero)
    with stages("load"):
        pipeline = ranks.on_all_ranks(lambda: load(args, ranks), DOWNLOAD)
        if ranks.size > 1:
            ranks.agree(ranks.on_all_ranks(lambda: fingerprints(args, pipeline)))
        if args.preload_models:
            pipeline.ensure_models_are_loaded()
    if args.prompts_folder:
        make_folder(pipeline, args, ranks, stages)
        stages.report()
        return
    pictures = make_pictures(pipeline, args, ranks, stages)
    with stages("save"):
        paths = ranks.on_all_ranks(lambda: save(args, pictures) if ranks.is_rank_zero else [])
    stages.report()
    print(*paths, sep="\n")


def load(args: argparse.Namespace, ranks: Ranks) -> FluxPipeline:
    files = {part: getattr(args, part) for part in PARTS}
    dtype = args.dtype and getattr(mx, args.dtype)
    adapters = (args.adapter or (), args.fuse_adapter, ranks if ranks.model_parallel else None)
    pipeline = FluxPipeline(args.model, not args.no_t5_padding, dtype, args.quantize, *adapters, **files)
    fill_in(args, pipeline)
    return pipeline


def fingerprints(args: argparse.Namespace, pipeline: FluxPipeline) -> dict[str, str]:
    """What must be the same on all ranks."""
    return pipeline.checkpoint.fingerprints() | {
        f"adapter {file}": tensors.fingerprint(Path(file)) for file, _ in args.adapter or ()
    }


# --- Arguments ---


def build_parser() -> Parser:
    parser = Parser(description="Make pictures of what a prompt says, with a FLUX.1 model.", epilog=SEVERAL)
    parser.set_defaults(picture=None)  # of a batch, which one to keep: only a recipe says so

    add = parser.add_argument_group("what to show").add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what the pictures show; several are made in turn")
    add("--prompts-file", metavar="FILE", help="read prompts from FILE, one a line; - is standard input")
    add(
        "--prompts",
        dest="prompts_folder",
        metavar="DIR",
        help="make DIR/NAME.txt's text the picture NAME.png in --output's folder, for every .txt; "
        "go on with what a stopped run has left",
    )
    add("--negative-prompt", metavar="TEXT", help="what to lead away from; needs a cfg scale above 1")
    add("--remake", metavar="PICTURE", help="make a PNG of this program again; other options change it")

    add = parser.add_argument_group("the model").add_argument
    add("--model", default="schnell", help="schnell (default), dev, krea, tiny, a folder, a Hub repository")
    for part in PARTS:
        add(f"--{part}", metavar="FILE", help=f"take the {part} from FILE instead of the model's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32")
    add("--quantize", nargs="?", type=int, const=4, metavar="BITS", help="to 4 (default) or 8 bits a weight")
    add(
        "--adapter",
        action="append",
        type=adapter,
        metavar="FILE[:X]",
        help="add a LoRA, X (1) times as strong",
    )
    add("--fuse-adapter", action="store_true", help="adapters into the weights, not beside them: faster")
    add("--no-t5-padding", action="store_true", help="do not pad prompts to the model's length: faster")
    add("--force-shard", action="store_true", help="split the model over mlx.launch's ranks in any case")
    add("--preload-models", action="store_true", help="load everything at once and keep it: more memory")

    add = parser.add_argument_group("sampling (where not given, the model's own)").add_argument
    add("--image-size", type=size, metavar="HxW", help="in pixels, multiples of 16; one number is a square")
    add("--steps", type=count, metavar="N", help="denoising steps")
    add("--guidance", type=finite, metavar="X", help="how closely to follow the prompt (not schnell)")
    add("--cfg-scale", type=finite, metavar="X", help="true guidance, with twice the work if above 1")
    add("--seed", type=int, metavar="N", help="a prompt's picture i is made from N + i; default: random")

    add = parser.add_argument_group("output").add_argument
    add("--n-images", type=count, metavar="N", help="pictures for each prompt (default 1)")
    add("--n-rows", type=count, metavar="N", help="rows of the grid (default: one for each prompt)")
    add("--output", metavar="FILE", help=".png (default out.png), .jpg or .webp; with --prompts a folder")
    add("--save-raw", action="store_true", help="no grid: each picture in a file, out.0.png, out.1.png ...")
    add("--decoding-batch-size", type=count, default=1, metavar="N", help="pictures to decode at once (1)")
    add("--verbose", action="store_true", help="print the time and the peak memory of every stage")
    add("--version", action="version", version=flux.__version__)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. With --remake the picture's recipe stands for what is not given."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    prompts = read_prompts(args)
    if args.remake:
        recipe, its_prompts = read_recipe(args.remake)
        if prompts or args.seed is not None or args.n_images:
            recipe.pop("picture", None)  # it is no longer that batch
        adapters = str(recipe.pop("adapter", "")).splitlines()
        if not args.adapter:  # not as a default: one that is given would be added to it
            argv = [*(f"--adapter={text}" for text in adapters), *argv]
        parser.set_defaults(**recipe)
        args = parser.parse_intermixed_args(argv)
        prompts = prompts or its_prompts
    args.prompts = prompts
    args.n_images = args.n_images or 1
    args.output = args.output or ("" if args.prompts_folder else "out.png")
    args.random_seed = sampler.random_seed()  # for where none is given: here, so that all ranks have the same
    check(args)
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line or of the file. A line break in one is a space to the models."""
    prompts = [" ".join(prompt.splitlines()) for prompt in args.prompts]
    if args.prompts_file is None and args.prompts_folder is None:
        return prompts
    if prompts or None not in (args.prompts_file, args.prompts_folder):
        raise FluxError("prompts come from the command line, --prompts-file or --prompts, not from two")
    if args.prompts_file is None:
        return [read_prompt(path) for path in prompt_files(args.prompts_folder)]
    name = "standard input" if args.prompts_file == "-" else args.prompts_file
    try:
        data = sys.stdin.buffer.read() if args.prompts_file == "-" else Path(args.prompts_file).read_bytes()
        prompts = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise FluxError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise FluxError(f"cannot read the prompts' file {name}: {error.strerror}") from None
    if not prompts:
        raise FluxError(f"{name} holds no prompt; it should hold one a line")
    return prompts


def prompt_files(folder: str) -> list[Path]:
    """The .txt files of a folder, but not of those in it, by name; no two that would name one picture."""
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() == ".txt")
    except OSError as error:
        raise FluxError(f"cannot read the prompts' folder {folder}: {error.strerror}") from None
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    if not paths:
        raise FluxError(f"the prompts' folder {folder} holds no .txt file; it should hold one a prompt")
    names: dict[str, Path] = {}
    for path in paths:
        other = names.setdefault(path.stem.casefold(), path)  # some file systems take A.png for a.png
        if other is not path:
            raise FluxError(f"{other} and {path.name} would both be the picture {path.stem}.png: rename one")
    return paths


def read_prompt(path: Path) -> str:
    """The text of a file as one line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FluxError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise FluxError(f"cannot read the prompt {path}: {error.strerror}") from None
    if not text.strip():
        raise FluxError(f"{path} is empty; it should say what its picture shows")
    return " ".join(text.split())


def check(args: argparse.Namespace) -> None:
    """Raise FluxError for what can be seen to be wrong before anything is loaded."""
    if not args.prompts:
        raise FluxError("no prompt; say what the picture should show, such as 'a red apple'")
    if not all(prompt.strip() for prompt in args.prompts):
        raise FluxError("the prompt is empty; say what the picture should show, such as 'a red apple'")
    if args.quantize not in (None, 4, 8):
        raise FluxError(f"--quantize takes 4 or 8 bits, not {args.quantize}")
    if args.fuse_adapter and not args.adapter:
        raise FluxError("--fuse-adapter needs an adapter; name it with --adapter")
    pictures = (1 if args.prompts_folder else len(args.prompts)) * args.n_images
    if args.n_rows and args.n_rows > pictures and not args.save_raw:
        raise FluxError(f"--n-rows {args.n_rows} is more than there are pictures ({pictures})")
    if args.prompts_folder:
        check_folder(args.output)
    else:
        images.check_output(args.output)


def check_folder(output: str) -> None:
    """Raise FluxError where pictures could not be written into the output's folder, or it not be made."""
    folder = Path(output)
    is_picture = folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not folder.is_dir()
    if not output or folder.is_file() or is_picture:
        raise FluxError(f"--prompts needs a folder as --output, not {output or 'nothing'}")
    images.check_output((folder if folder.is_dir() else folder.parent) / "out.png")


def fill_in(args: argparse.Namespace, pipeline: FluxPipeline) -> None:
    """Give every option that was left open its value, so that the recipe is whole."""
    for name in ("steps", "guidance", "cfg_scale", "image_size"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(pipeline.spec, name))
    if args.guidance != pipeline.spec.guidance and not pipeline.flow.params.guidance_embed:
        warnings.warn(f"{pipeline.spec.name} takes no guidance; {args.guidance} has no effect", stacklevel=2)
    args.n_rows = args.n_rows or (1 if args.prompts_folder else len(args.prompts))
    args.dtype = str(pipeline.flow.dtype).removeprefix("mlx.core.")
    args.latent_size = pipeline.latent_size(args.image_size)
    args.image_size = tuple(pipeline.downscale * side for side in args.latent_size)
    check_sampling(args.steps, args.n_images, args.latent_size, args.negative_prompt, args.cfg_scale)
    if args.seed is None:
        args.seed = args.random_seed
        print(f"seed: {args.seed}", flush=True)


# --- Pictures ---


def make_pictures(
    pipeline: FluxPipeline, args: argparse.Namespace, ranks: Ranks, stages: "Stages"
) -> list[np.ndarray]:
    """All pictures (H, W, 3), uint8, prompt by prompt; a stage at a time in memory, unless preloaded."""
    singles = batches(args, len(args.prompts), 1)
    with ranks.waiting(len(args.prompts) * PATIENCE):
        texts = encode(pipeline, args, args.prompts, ranks.local_items(singles), stages)
    with stages("denoise"), progress(args, singles, ranks) as bar:
        # One by one: in a batch, sums would be in another order, and the bits depend on who is with whom.
        latents = list(ranks.map(denoiser(pipeline, args, texts, bar), singles))
    if not args.preload_models:
        del pipeline.flow
        mx.clear_cache()
    if ranks.model_parallel and not ranks.is_rank_zero:
        return []
    with stages("decode"):
        pictures = []
        groups = batches(args, len(args.prompts), args.decoding_batch_size)
        tokens = mx.concatenate(latents)  # (pictures, L, channels)

        def work(batch: Batch) -> mx.array:
            first = batch.prompt * args.n_images
            return decode(pipeline, tokens[first + batch.start : first + batch.stop], args)

        # Where the model is split, this rank is here alone.
        for group in map(work, groups) if ranks.model_parallel else ranks.map(work, groups):
            pictures += list(np.array(group))
    return pictures if args.picture is None else [pictures[args.picture]]


def make_folder(pipeline: FluxPipeline, args: argparse.Namespace, ranks: Ranks, stages: "Stages") -> None:
    """Every prompt's pictures, each written as soon as it is made: a stopped run loses one prompt's at most.

    For that, the transformer stays in memory beside the autoencoder. Pictures that are there already with the
    same recipe are kept, if no file that it names has changed since; all others are written over.
    """
    tasks = ranks.on_all_ranks(lambda: folder_tasks(args) if ranks.is_rank_zero else [])
    changed = last_change(args)
    numbers = ranks.broadcast_result(
        lambda: [i for i, task in enumerate(tasks) if not is_done(task, changed)]
    )
    if (kept := len(args.prompts) - len(numbers)) and ranks.is_rank_zero:
        print(f"kept, made before in the same way: {kept} of {len(args.prompts)} prompts", file=sys.stderr)
    if not numbers:
        return
    groups = batches(args, len(numbers), args.decoding_batch_size)
    with ranks.waiting(len(numbers) * PATIENCE):
        texts = encode(pipeline, args, [args.prompts[i] for i in numbers], ranks.local_items(groups), stages)
    ranks.on_all_ranks(lambda: make_directory(args.output) if ranks.is_rank_zero else None)
    with stages("pictures"), progress(args, groups, ranks) as bar:
        denoise = denoiser(pipeline, args, texts, bar)

        def work(batch: Batch) -> mx.array | None:
            tokens = mx.concatenate([denoise(batch.one(k)) for k in range(batch.start, batch.stop)])
            return decode(pipeline, tokens, args) if ranks.is_rank_zero or not ranks.model_parallel else None

        pictures = []
        for group, batch in zip(ranks.map(work, groups), groups, strict=True):
            if not ranks.is_rank_zero:
                continue
            pictures += list(np.array(group))
            if batch.stop == args.n_images:
                for path in save(tasks[numbers[batch.prompt]], pictures):
                    tqdm.write(str(path))
                pictures = []


def folder_tasks(args: argparse.Namespace) -> list[argparse.Namespace]:
    """For each prompt of a folder the arguments that would make its pictures alone."""
    tasks = []
    for path, prompt in zip(prompt_files(args.prompts_folder), args.prompts, strict=True):
        task = copy.copy(args)
        task.prompts, task.output, task.picture = [prompt], str(Path(args.output) / f"{path.stem}.png"), None
        tasks.append(task)
    return tasks


def last_change(args: argparse.Namespace) -> float:
    """When a file that the pictures are made with was last written: of the model, its parts, the adapters."""
    names = [args.model, *(getattr(args, part) for part in PARTS), *(file for file, _ in args.adapter or ())]
    given = [Path(name) for name in names if name and Path(name).exists()]
    return max((file.stat().st_mtime for path in given for file in (path, *path.rglob("*"))), default=0)


def is_done(task: argparse.Namespace, changed: float) -> bool:
    """Whether all pictures of a task are there, with its recipe, and newer than the last change."""
    try:
        return all(
            path.is_file() and path.stat().st_mtime > changed and images.read_metadata(path) == recipe
            for path, recipe in outputs(task)
        )
    except FluxError:  # a damaged file
        return False


def make_directory(folder: str) -> None:
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as error:
        raise FluxError(f"cannot make the output's folder {folder}: {error.strerror}") from None


class Batch(NamedTuple):
    """Pictures start, ..., stop - 1 of a prompt."""

    prompt: int
    start: int
    stop: int

    def one(self, picture: int) -> "Batch":
        return Batch(self.prompt, picture, picture + 1)


def batches(args: argparse.Namespace, prompts: int, size: int) -> list[Batch]:
    """All pictures, at most `size` of a prompt together."""
    starts = range(0, args.n_images, size)
    return [Batch(i, k, min(k + size, args.n_images)) for i in range(prompts) for k in starts]


def progress(args: argparse.Namespace, items: list[Batch], ranks: Ranks) -> tqdm:
    """A bar of rank 0's steps."""
    total = args.steps * sum(batch.stop - batch.start for batch in ranks.local_items(items))
    return tqdm(total=total, unit="step", disable=None if ranks.is_rank_zero else True)


def encode(
    pipeline: FluxPipeline,
    args: argparse.Namespace,
    prompts: list[str],
    items: list[Batch],
    stages: "Stages",
) -> dict[int, Conditioning]:
    """The conditioning of the items' prompts; unless preloaded, the text encoders leave memory."""
    with stages("text"):
        settings = (args.negative_prompt, args.cfg_scale)
        texts = {
            i: pipeline.encode(prompts[i], *settings) for i in dict.fromkeys(item.prompt for item in items)
        }
        mx.eval(texts)
    if not args.preload_models:
        del pipeline.t5, pipeline.clip
        mx.clear_cache()
    return texts


def denoiser(
    pipeline: FluxPipeline, args: argparse.Namespace, texts: dict[int, Conditioning], bar: tqdm
) -> Callable[[Batch], mx.array]:
    """A function that gives a picture's finished latents (1, L, channels)."""
    noise = pipeline.noise(range(args.seed, args.seed + args.n_images), args.latent_size)
    settings = (noise, args.latent_size, args.steps, args.guidance, args.cfg_scale)
    few = not args.preload_models and len(texts) <= MAX_PLANS

    @lru_cache(maxsize=len(texts) if few else 1)
    def plan(prompt: int) -> Plan:
        return pipeline.prepare(texts[prompt], *settings)

    if few:
        mx.eval([plan(prompt) for prompt in texts])
        pipeline.flow.drop_modulation()

    def denoise(picture: Batch) -> mx.array:
        own = plan(picture.prompt)._replace(x=noise[picture.start : picture.stop])
        for x in pipeline.denoise(own):
            mx.eval(x)
            bar.update()
        return x

    return denoise


def decode(pipeline: FluxPipeline, x: mx.array, args: argparse.Namespace) -> mx.array:
    """Latents (B, L, channels) -> pictures (B, H, W, 3), uint8."""
    return mx.array(images.to_uint8(pipeline.decode(x, args.latent_size)))


# --- Files and their recipes ---


def save(args: argparse.Namespace, pictures: list[np.ndarray]) -> list[Path]:
    """Write the pictures, as a grid or each by itself, with their recipes; where they are."""
    files = outputs(args)
    if not args.save_raw:
        pictures = [images.grid(pictures, 1 if args.picture is not None else args.n_rows)]
    for (path, recipe), picture in zip(files, pictures, strict=True):
        images.save(path, picture, recipe)
    return [path for path, _ in files]


def outputs(args: argparse.Namespace) -> list[tuple[Path, dict[str, str]]]:
    """The files that the arguments' pictures become, each with its recipe.

    Each of several files has its prompt alone but the whole batch: in a batch, sums are in another order.
    """
    path = Path(args.output)
    seeds = list(range(args.seed, args.seed + args.n_images)) * len(args.prompts)
    if not args.save_raw:
        seeds = seeds if args.picture is None else [seeds[args.picture]]
        return [(path, recipe_text(args, args.prompts, seeds, args.picture))]
    files = []
    for i in range(len(seeds) if args.picture is None else 1):
        number, k = divmod(i, args.n_images)
        k = k if args.picture is None else args.picture
        recipe = recipe_text(args, [args.prompts[number]], [args.seed + k], k)
        files.append((path.with_name(f"{path.stem}.{i}{path.suffix}"), recipe))
    return files


def recipe_text(
    args: argparse.Namespace, prompts: list[str], seeds: list[int], picture: int | None
) -> dict[str, str]:
    """What made a file, as the text that --remake reads."""
    values = {name: getattr(args, name) for name in RECIPE}
    values["adapter"] = "\n".join(f"{file}:{strength}" for file, strength in args.adapter or ()) or None
    values["image_size"] = "x".join(map(str, args.image_size))
    values |= {"picture": picture, "n_rows": min(args.n_rows, len(prompts) * args.n_images)}
    recipe = {name: str(value) for name, value in values.items() if value not in (None, False)}
    return {
        "prompt": "\n".join(prompts),
        **recipe,
        "seeds": " ".join(map(str, seeds)),
        "version": f"{PROGRAM} {flux.__version__}",
    }


def read_recipe(path: str) -> tuple[dict[str, object], list[str]]:
    """A picture's options, as the parser's defaults, and its prompts."""
    text = images.read_metadata(path)
    if not text.get("version", "").startswith(PROGRAM):
        raise FluxError(f"{path} does not say how it was made: only PNGs of this program can be made again")
    recipe: dict[str, object] = {name: text[name] for name in RECIPE if name in text}
    recipe |= {name: name in text for name in FLAGS}
    if "picture" in text:
        recipe["picture"] = int(text["picture"])
    return recipe, text["prompt"].split("\n")


class Stages:
    """Times and peak memory of the stages, for --verbose: `with stages("decode"): ...`."""

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.rows: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        self.rows.append((name, time.perf_counter() - start, mx.get_peak_memory() / 1e9))

    def report(self) -> None:
        if self.verbose:
            print(f"{'stage':8} {'seconds':>9} {'peak GB':>9}", file=sys.stderr)
            for name, seconds, memory in self.rows:
                print(f"{name:8} {seconds:9.2f} {memory:9.3f}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
