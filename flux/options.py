"""The command line of the program that makes pictures, a function for each group."""

from flux import images, sampler
from flux.arguments import (
    Parser,
    adapter,
    cache_folder,
    cache_threshold,
    count,
    finite,
    padding,
    pixels,
    shift,
    sides,
    size,
)
from flux.conditioning.controlnets import MODES
from flux.metadata import PARTS
from flux.models.transformer import ROUNDINGS
from flux.solvers import SOLVERS
from flux.version import __version__
from flux.weights.quantize import KINDS
from flux.weights.registry import TINY_DECODER

SEVERAL = (
    "With mlx.launch the ranks share out the pictures; where there are fewer pictures than ranks, each has a "
    "part of the model instead, of its attention heads. All need the model under the same path; rank 0 alone "
    "reads prompts and writes."
)


def build_parser() -> Parser:
    """The command line of the program that makes pictures."""
    parser = Parser(description="Make pictures of what a prompt says, with a FLUX.1 model.", epilog=SEVERAL)
    # Only a recipe says these: of a prompt's pictures the one to keep, and what --remake's pictures were.
    parser.set_defaults(picture=None, pictures={})

    _add_prompts(parser)
    _add_edit(parser)
    _add_references(parser)
    _add_controlnets(parser)
    _add_redux(parser)
    _add_model(parser)
    _add_sampling(parser)
    _add_output(parser)
    return parser


def _add_prompts(parser: Parser) -> None:
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
    add("--negative-prompt", metavar="TEXT", help="what to lead away from; needs a cfg scale above 1 or NAG")
    add("--clip-prompt", metavar="TEXT", help="what CLIP reads, if not the prompt; T5 reads the prompt")
    add("--remake", metavar="PICTURE", help="make a picture of this program again; other options change it")
    add(
        "--workflow",
        metavar="FILE",
        help="make what a ComfyUI workflow makes, from a .json or a picture, with files of --model's folder, "
        "ComfyUI's or its models/; other options change it",
    )


def _add_edit(parser: Parser) -> None:
    add = parser.add_argument_group("a picture that is changed").add_argument
    add("--image", metavar="PICTURE", help="the picture to start from")
    add(
        "--strength",
        type=finite,
        metavar="X",
        help="how much changes: from 0, the picture itself, to 1, as from noise; default: 0.6, with a mask 1",
    )
    add(
        "--mask",
        metavar="PICTURE",
        help="change the picture only where this one is white, less where it is grey; alpha: where --image "
        "is transparent",
    )
    add(
        "--expand",
        type=sides,
        metavar="T,R,B,L",
        help="pixels to add at top, right, bottom and left, which are made to go with the rest",
    )
    add(
        "--fit",
        choices=images.FITS,
        default="crop",
        help="how the picture, which else keeps its size, becomes one of --image-size: crop what is too much "
        "(default), pad with the outermost pixels, or stretch",
    )
    add(
        "--grow",
        type=pixels,
        default=0,
        metavar="N",
        help="pixels by which the mask grows; -N shrinks it",
    )
    add(
        "--feather",
        type=pixels,
        default=0,
        metavar="N",
        help="pixels around what changes over which it goes over into the picture (default 0)",
    )
    add(
        "--crop-mask",
        nargs="?",
        type=padding,
        const="auto",
        metavar="N",
        help="work on the part around the mask, with N pixels around it, at --image-size or the model's, and "
        "put it back: for what is small in a large picture",
    )
    add(
        "--no-keep",
        action="store_true",
        help="take all of the result; else the picture stays, to the bit, outside mask and feather",
    )


def _add_references(parser: Parser) -> None:
    add = parser.add_argument_group("pictures that the prompt speaks of (--model kontext)").add_argument
    add(
        "--reference",
        action="append",
        metavar="PICTURE",
        help="what the prompt changes, or several; the result has the first one's aspect",
    )


def _add_controlnets(parser: Parser) -> None:
    add = parser.add_argument_group(
        "control pictures (--model canny or depth, their LoRAs, ControlNets)",
        "Repeated for several ControlNets, in the same order; a mode, strength, start or end given once is "
        "for all.",
    ).add_argument
    add(
        "--controlnet",
        action="append",
        metavar="FILE",
        help="a file or folder, or owner/name[:FILE]: InstantX's, Shakker-Labs', jasperai's, XLabs'",
    )
    add(
        "--control",
        action="append",
        metavar="PICTURE",
        help="what is followed: a picture of edges, depth, a pose ...; cut to the size of what is made",
    )
    add(
        "--control-mode",
        action="append",
        metavar="MODE",
        help=f"what a union is told: {', '.join(MODES)} or a number; none for another ControlNet beside it",
    )
    add("--control-strength", action="append", type=finite, metavar="X", help="default 1")
    add("--control-start", action="append", type=finite, metavar="X", help="share of the steps, default 0")
    add("--control-end", action="append", type=finite, metavar="X", help="share of the steps, default 1")
    add(
        "--control-edges",
        action="store_true",
        help="the control pictures are photos: take their edges, by OpenCV (requirements-control.txt)",
    )


def _add_redux(parser: Parser) -> None:
    add = parser.add_argument_group("pictures beside the prompt (FLUX.1 Redux)").add_argument
    add(
        "--redux",
        action="append",
        type=adapter,
        metavar="PICTURE[:X]",
        help="make variations of PICTURE, X (1) times as strong, up to 1; several are put together; the "
        "prompt may then be left out, and --negative-prompt has no pictures",
    )
    add(
        "--redux-blend",
        action="store_true",
        help="mix the pictures into one, as diffusers does, not one after the other: faster",
    )
    add(
        "--redux-model",
        metavar="FILE",
        help="Redux's file, folder or owner/name, with SigLIP beside it (default: black-forest-labs's)",
    )
    add("--siglip", metavar="FILE", help="SigLIP's file, folder or owner/name, where it is elsewhere")


def _add_model(parser: Parser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        help="schnell (default), dev, krea, fill, canny, depth, kontext, tiny, a folder or file, "
        "owner/name[:FILE]",
    )
    for part in PARTS:
        add(f"--{part}", metavar="FILE", help=f"take the {part} from FILE instead of the model's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32")
    add(
        "--quantize", nargs="?", choices=KINDS, const="4", help="the blocks and T5 to so few bits (default 4)"
    )
    add(
        "--adapter",
        action="append",
        type=adapter,
        metavar="FILE[:X]",
        help="a LoRA, X (1) times as strong",
    )
    add("--fuse-adapter", action="store_true", help="adapters into the weights, not beside them: faster")
    add("--no-t5-padding", action="store_true", help="do not pad prompts to the model's length: faster")
    add("--t5-padding", type=count, metavar="N", help="pad prompts to N tokens (ComfyUI: 256)")
    add("--rounding", choices=ROUNDINGS, default="bfloat16", help="of time and guidance in 16-bit types")
    add("--force-shard", action="store_true", help="split the model over mlx.launch's ranks in any case")
    add(
        "--text-cache",
        nargs="?",
        type=cache_folder,
        const="",
        metavar="DIR",
        help="keep what the text encoders say of prompts in DIR (default: ~/.cache/flux-mlx/texts), so that "
        "T5 is read for new prompts alone: up to 4 MB a prompt, 8 in float32, never taken away",
    )
    add("--preload-models", action="store_true", help="load everything at once and keep it: more memory")


def _add_sampling(parser: Parser) -> None:
    add = parser.add_argument_group("sampling (where not given, the model's)").add_argument
    add(
        "--image-size",
        type=size,
        metavar="HxW",
        help="in pixels, multiples of 16; one number is a square",
    )
    add("--steps", type=count, metavar="N", help="denoising steps")
    add(
        "--guidance",
        type=finite,
        metavar="X",
        help="how closely to follow the prompt (not schnell)",
    )
    add("--shift", type=shift, metavar="X", help="of the times: dev, none, or a factor such as 3")
    add(
        "--solver",
        choices=SOLVERS,
        default="euler",
        help="dpmpp2m and unipc need fewer steps than euler, heun half as many of twice the work",
    )
    add(
        "--schedule",
        choices=sampler.SCHEDULES,
        default="model",
        help="of the times: ComfyUI's have its names",
    )
    add(
        "--cfg-scale",
        type=finite,
        metavar="X",
        help="true guidance, with twice the work if above 1",
    )
    add("--cfg-end", type=finite, default=1.0, metavar="X", help="share of the steps with true guidance (1)")
    add("--nag", type=finite, metavar="SCALE", help="lead attention away from the negative prompt; FLUX: 5")
    add(
        "--cache",
        type=cache_threshold,
        metavar="X",
        help="skip most blocks where a step is much like those before: faster, and a little another picture. "
        "low, medium, high, or by how much steps may differ, such as 0.1 (medium)",
    )
    add("--seed", type=int, metavar="N", help="a prompt's picture i is made from N + i; default: random")
    add(
        "--noise",
        choices=sampler.NOISES,
        default="mlx",
        help="whose random numbers a seed stands for: torch as in ComfyUI, and in diffusers with float32; "
        "diffusers: torch's in --dtype",
    )


def _add_output(parser: Parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--n-images", type=count, metavar="N", help="pictures for each prompt (default 1)")
    add("--n-rows", type=count, metavar="N", help="rows of the grid (default: one for each prompt)")
    add("--output", metavar="FILE", help=".png (default out.png), .jpg or .webp; with --prompts a folder")
    add("--save-raw", action="store_true", help="no grid: each picture in a file, out.0.png, out.1.png ...")
    add("--no-metadata", action="store_true", help="do not write into pictures how they were made")
    add(
        "--decoding-batch-size",
        type=count,
        default=1,
        metavar="N",
        help="pictures to decode at once (1)",
    )
    add(
        "--preview-every",
        type=count,
        metavar="N",
        help="show the picture so far after every N steps, in out.preview.png; gone when it is finished",
    )
    add(
        "--preview-decoder",
        nargs="?",
        const=TINY_DECODER,
        metavar="FILE",
        help=f"show it in detail, by TAEF1's file, folder or owner/name (default: {TINY_DECODER}, 10 MB)",
    )
    add("--verbose", action="store_true", help="print the time and the peak memory of every stage")
    add("--version", action="version", version=__version__)
