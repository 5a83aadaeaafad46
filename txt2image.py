"""Text to pictures: python txt2image.py --model tiny "a red apple on a blue background"."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice

import flux  # noqa: F401  before mlx.core, so that OpenBLAS is there first

# isort: split
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux import arguments, images, inputs, metadata, previews, sampler, text_cache
from flux.arguments import check_folder, run_program
from flux.conditioning import Picture
from flux.conditioning.pictures import read_bytes
from flux.distributed.ranks import DOWNLOAD, Ranks
from flux.errors import FluxError
from flux.generation import Stages, generate
from flux.metadata import PARTS, Recipe
from flux.models.nag import Nag
from flux.options import build_parser
from flux.pipeline import FluxPipeline
from flux.previews import Previews
from flux.requests import Request, ResolvedRequest
from flux.step_cache import BlockCount
from flux.weights import quantize, registry
from flux.workflows import comfyui
from flux.workflows.options import shown, to_options

MOST_PICTURES = 100_000  # of one grid, or one prompt of a folder


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Make the pictures that the command line asks for, and print where they are."""
    # Rank 0 alone needs the files that the arguments are read from, and a folder to write into.
    args = argparse.Namespace(**ranks.broadcast_result(lambda: vars(parse(sys.argv[1:]))))
    few = len(args.prompts) * args.n_images < ranks.size
    ranks.model_parallel = ranks.size > 1 and (args.force_shard or few)
    given = read_pictures(args, ranks)
    stages = Stages()
    with ranks.waiting(None):
        with stages("load"):
            pipeline = ranks.on_all_ranks(lambda: load(args, ranks), DOWNLOAD)
            requests = ranks.on_all_ranks(lambda: to_requests(args, given, pipeline))
            if ranks.size > 1:
                ranks.agree(ranks.on_all_ranks(pipeline.fingerprints))
            shown_so_far = ranks.on_all_ranks(lambda: to_previews(args, pipeline))
            if args.preload_models:
                pipeline.ensure_models_are_loaded()
        draw = partial(
            generate,
            pipeline,
            ranks=ranks,
            decoding_batch_size=args.decoding_batch_size,
            keep_models=args.preload_models,
            progress=True,
            stages=stages,
            on_estimate=shown_so_far if ranks.is_rank_zero else None,
        )
        recipe = to_recipe(args, requests[0], given, pipeline.flow.dtype)
        if args.prompts_folder:
            make_folder(args, recipe, requests, draw, ranks)
        else:
            size = requests[0].made_size(pipeline)
            ranks.rank_zero_only(lambda: recipe.check(args.output, args.save_raw, size))
            pictures = make(args, recipe, requests, partial(draw, keep_finished=True), shown_so_far, ranks)
            with stages("save"):
                save = partial(recipe.save, args.output, args.save_raw, pictures, args.no_metadata)
                print(*ranks.rank_zero_only(save) or (), sep="\n")
        if args.cache is not None:
            print_saved(pipeline.block_count, ranks)
        if shown_so_far is not None:
            shown_so_far.remove()
        if args.verbose and ranks.is_rank_zero:
            print(stages, file=sys.stderr)
        ranks.barrier()  # until rank 0 has written everything
    return 0


def read_pictures(args: argparse.Namespace, ranks: Ranks) -> dict[str, Picture]:
    """The pictures that the arguments name, by these names; rank 0 alone needs the files.

    FluxError for one that is gone, or another than the picture that --remake names was made from.
    """
    pictures = {}
    for name in inputs.names(vars(args)):
        data = ranks.broadcast_bytes(partial(read_bytes, name))
        pictures[name] = ranks.on_all_ranks(partial(Picture.from_bytes, name, data))
        if args.pictures.get(name, pictures[name].sha256) != pictures[name].sha256:
            raise FluxError(f"{name} is another picture than the one that {args.remake} was made from")
    return pictures


def load(args: argparse.Namespace, ranks: Ranks) -> FluxPipeline:
    """The model, lazily."""
    pipeline = FluxPipeline(
        args.model,
        t5_padding=not args.no_t5_padding and (args.t5_padding or True),
        dtype=args.dtype and getattr(mx, args.dtype),
        bits=args.quantize,
        adapters=args.adapter or (),
        fuse_adapters=args.fuse_adapter,
        ranks=ranks if ranks.model_parallel else None,
        shift=args.shift,
        noise=args.noise,
        rounding=args.rounding,
        controlnets=args.controlnet or (),
        redux=(args.redux_model or registry.REDUX) if args.redux else None,
        siglip=args.siglip,
        text_cache=text_cache.default_folder() if args.text_cache == "" else args.text_cache,
        **{part: getattr(args, part) for part in PARTS},
    )
    if args.quantize and ranks.is_rank_zero:
        networks = {"transformer": pipeline.flow, "T5": pipeline.t5}
        networks |= {f"ControlNet {i + 1}": n for i, n in enumerate(pipeline.controlnets.networks)}
        line = quantize.report(args.quantize, **networks)
        print(f"quantized: {line}", file=sys.stderr)
    return pipeline


def print_saved(count: BlockCount, ranks: Ranks) -> None:
    """What the step cache has saved on all ranks; on each rank of a split model it is the same."""
    mine = (count.saved, count.total)
    saved, total = map(sum, zip(*[mine] if ranks.model_parallel else ranks.gather(mine), strict=True))
    if ranks.is_rank_zero:
        print(f"step cache: {saved} of {total} block evaluations saved", file=sys.stderr)


# --- Arguments ---


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. With --remake or --workflow, what these say stands for what is not given."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if args.remake and args.workflow:
        raise FluxError("--remake and --workflow both say what to make; give one of them")
    prompts = arguments.find_prompts(args.prompts, args.prompts_file, args.prompts_folder)
    if args.remake or args.workflow:
        recipe, its_prompts = metadata.read(args.remake) if args.remake else read_workflow(args, prompts)
        if prompts or args.seed is not None or args.n_images:
            recipe.pop("picture", None)  # these are other pictures
        for name in metadata.REPEATED:
            lines = str(recipe.pop(name, "")).splitlines()
            if not getattr(args, name):  # not as a default: one that is given would be added to it
                argv = [*(f"--{name.replace('_', '-')}={line}" for line in lines), *argv]
        parser.set_defaults(**recipe)
        args = parser.parse_intermixed_args(argv)
        prompts = prompts or its_prompts
    args.prompts = prompts or ([""] if args.redux and not args.prompts_folder else [])
    args.model = args.model or "schnell"
    args.n_images = args.n_images or 1
    args.output = args.output or ("" if args.prompts_folder else "out.png")
    args.random_seed = sampler.random_seed()  # for where none is given: here, so that all ranks have the same
    check(args)
    return args


def read_workflow(args: argparse.Namespace, prompts: list[str]) -> tuple[dict[str, object], list[str]]:
    """A workflow's options and prompt; shows them as a command line, and what ComfyUI does otherwise."""
    workflow = comfyui.read(args.workflow)
    given = [name for name in (*PARTS, "adapter", "reference") if getattr(args, name)]
    options = to_options(workflow, args.model, given)
    its_prompts = arguments.find_prompts([workflow.prompt], None, None)
    for note in workflow.notes:
        print(f"{args.workflow}: {note}", file=sys.stderr)
    print(f"{args.workflow}: {shown(options, prompts or its_prompts)}", file=sys.stderr, flush=True)
    return options, its_prompts


def check(args: argparse.Namespace) -> None:
    """Raise FluxError for what can be seen to be wrong before anything is loaded."""
    if not args.prompts:
        raise FluxError("no prompt; say what the picture should show, such as 'a red apple'")
    if not args.redux and not all(prompt.strip() for prompt in args.prompts):
        raise FluxError("the prompt is empty; say what the picture should show, such as 'a red apple'")
    inputs.check(vars(args), vars(build_parser().parse_args([])))
    if args.fuse_adapter and not args.adapter:
        raise FluxError("--fuse-adapter needs an adapter; name it with --adapter")
    if args.preview_decoder and not args.preview_every:
        raise FluxError("--preview-decoder shows previews; say how often with --preview-every N")
    pictures = (1 if args.prompts_folder else len(args.prompts)) * args.n_images
    if pictures > MOST_PICTURES:
        raise FluxError(f"--n-images {args.n_images} makes {pictures} pictures; {MOST_PICTURES} are the most")
    if args.n_rows and args.n_rows > pictures and not args.save_raw:
        raise FluxError(f"--n-rows {args.n_rows} is more than there are pictures ({pictures})")
    if args.prompts_folder:
        stems = [path.stem for path in arguments.prompt_files(args.prompts_folder)]
        check_folder(args.output, max(stems, key=len))
    else:
        images.check_output(args.output)


# --- Pictures ---


def to_requests(
    args: argparse.Namespace, pictures: Mapping[str, Picture], pipeline: FluxPipeline
) -> list[ResolvedRequest]:
    """A request for each prompt. Prints the seed where none is given."""
    seed = args.random_seed if args.seed is None else args.seed
    request = Request(
        prompt="",
        seeds=tuple(range(seed, seed + args.n_images)),
        negative_prompt=args.negative_prompt,
        image_size=args.image_size,
        steps=args.steps,
        guidance=args.guidance,
        cfg_scale=args.cfg_scale,
        schedule=args.schedule,
        clip_prompt=args.clip_prompt,
        edit=inputs.to_edit(vars(args), pictures),
        cfg_end=args.cfg_end,
        nag=None if args.nag is None else Nag(args.nag),
        references=tuple(pictures[name] for name in args.reference or ()),
        control=pictures[args.control[0]] if args.control and not args.controlnet else None,
        control_edges=args.control_edges and not args.controlnet,
        controlnets=inputs.to_controls(vars(args), pictures),
        solver=args.solver,
        cache=args.cache,
        redux=tuple((pictures[name], strength) for name, strength in args.redux or ()),
        redux_blend=args.redux_blend,
    ).resolved(pipeline)
    if args.seed is None:
        print(f"seed: {seed}", flush=True)
    return [replace(request, prompt=prompt) for prompt in args.prompts]


def to_recipe(
    args: argparse.Namespace, request: ResolvedRequest, pictures: Mapping[str, Picture], dtype: mx.Dtype
) -> Recipe:
    """What is written into the files: the arguments, with what a request has instead of their defaults."""
    options = {name: getattr(args, name) for name in metadata.OPTIONS}
    options |= {name: getattr(request, name) for name in ("steps", "guidance", "cfg_scale")}
    return Recipe(
        prompts=tuple(args.prompts),
        seed=request.seeds[0],
        n_images=args.n_images,
        n_rows=args.n_rows or (1 if args.prompts_folder else len(args.prompts)),
        options=options | {"dtype": str(dtype).removeprefix("mlx.core.")},
        adapter=args.adapter or (),
        image_size=request.image_size,
        picture=args.picture,
        pictures={name: picture.sha256 for name, picture in pictures.items()},
    )


def to_previews(args: argparse.Namespace, pipeline: FluxPipeline) -> Previews | None:
    """What shows the picture so far, if it is to be shown."""
    if args.preview_every is None:
        return None
    colours = previews.choose(pipeline.ae, args.preview_decoder)
    return Previews(previews.path_beside(args.output), args.preview_every, colours, pipeline.downscale)


def make(
    args: argparse.Namespace,
    recipe: Recipe,
    requests: list[ResolvedRequest],
    draw: Callable,
    shown_so_far: Previews | None,
    ranks: Ranks,
) -> list[np.ndarray]:
    """The pictures. When Ctrl-C stops it, those that are finished are written, each in a file."""
    pictures: list[np.ndarray] = []
    try:
        for picture in draw(requests):
            pictures.append(picture)
    except KeyboardInterrupt:
        if ranks.size == 1:
            for path in recipe.save_finished(args.output, pictures, args.no_metadata):
                print(path)
            tell_of_interrupt(len(pictures), sum(len(r.seeds) for r in requests), shown_so_far)
        raise
    return pictures


def tell_of_interrupt(finished: int, total: int, shown_so_far: Previews | None) -> None:
    """One line of what there is, if there is anything."""
    so_far = shown_so_far is not None and shown_so_far.write()
    if finished or so_far:
        left = f"; the latest preview: {shown_so_far.path}" if shown_so_far and so_far else ""
        print(f"interrupted: {finished} of {total} pictures were finished{left}", file=sys.stderr)


def make_folder(
    args: argparse.Namespace, recipe: Recipe, requests: list[ResolvedRequest], draw: Callable, ranks: Ranks
) -> None:
    """Make every prompt's pictures and write them as soon as they are made: a stopped run loses one prompt's.

    Pictures that are there already, made in the same way, are kept, if no file that they are made with has
    changed since; all others are written over.
    """
    recipes = [replace(recipe, prompts=(prompt,), picture=None) for prompt in args.prompts]
    outputs = ranks.broadcast_result(
        lambda: [f"{args.output}/{path.stem}.png" for path in arguments.prompt_files(args.prompts_folder)]
    )
    todo = ranks.broadcast_result(lambda: metadata.unmade(recipes, outputs, args.save_raw))
    if (kept := len(requests) - len(todo)) and ranks.is_rank_zero:
        print(f"kept, made before in the same way: {kept} of {len(requests)} prompts", file=sys.stderr)
    if not todo:
        return
    pictures = draw([requests[i] for i in todo], stream=True)
    for i in todo if ranks.is_rank_zero else ():
        made = list(islice(pictures, args.n_images))
        images.make_folder(args.output)
        for path in recipes[i].save(outputs[i], args.save_raw, made, args.no_metadata):
            tqdm.write(str(path))
    list(pictures)  # on the other ranks all the work


if __name__ == "__main__":
    sys.exit(main())
