"""The command line of a fine-tuning: the parser, and what it gives as fields of `Options`."""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flux.adapters import TARGETS
from flux.adapters.writers import WRITERS
from flux.arguments import Parser, adapter, count, finite, size
from flux.data.schema import GROUP, SUBSET
from flux.errors import FluxError
from flux.tables import Faults
from flux.training import losses, optimizers, schedules
from flux.training.finetune import option_files
from flux.training.finetune.options import ITERATIONS, PARTS, QUANTIZE, WARMUP, Options
from flux.training.flow_matching import DELTA_SCHEDULES
from flux.version import __version__

ON: dict[str, Any] = {"action": "store_true"}
SEVERAL = (
    "With mlx.launch the ranks share out the batches. What counts is ranks x --iterations x --batch-size, "
    "the pictures in all, and ranks x --grad-accumulate x --batch-size, those of an update: where both stay "
    "the same, so does the adapter. 1200 iterations that accumulate 8 on one machine are 300 that accumulate "
    "2 on four; --resume does this by itself. All ranks need the model and the data set under the same path; "
    "rank 0 alone writes, but for --cache-dir, and its options hold."
)


TEXTS = {"resolution": size, "adapters": adapter}  # options that a file of options has as the command line


def given_options(words: Sequence[str]) -> dict[str, Any]:
    """What a command line and its file of options give, by the parser's names; the former goes first."""
    given = vars(build_parser().parse_args(words))
    file = given.pop("options", None)
    if file is None:
        return given
    found, notes = option_files.read(Path(file), _converters())
    for note in notes:
        warnings.warn(f"{file}: {note}", stacklevel=2)
    return option_files.merged(found, given)


def table_options(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `to_options`, of a table such as a file of options holds, and what is not used of it, a line each.

    FluxError with every fault.
    """
    faults = Faults()
    found, notes = option_files.of_table(table, _converters(), faults)
    if faults.lines:
        raise FluxError("; ".join(faults.lines))
    return to_options(option_files.merged(found, {})), notes


def _converters() -> dict[str, Callable[[str], Any]]:
    return {name: _as_input(convert) for name, convert in TEXTS.items()}


def _as_input(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type for other input: its error is one of bad input."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise FluxError(str(error)) from None

    return converted


def to_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were given, as fields of Options."""
    given = dict(given)
    config = given.pop("config", None)
    if config is not None and given.get("data"):
        raise FluxError(f"the data set is {given['data']} or --config {config}, not both")
    data = config or given.pop("data", None)
    tables = {
        "data_options": {name: given.pop(name) for name in (*GROUP, *SUBSET) if name in given},
        "files": {part: given.pop(part) for part in PARTS if part in given},
    }
    given |= {name: table for name, table in tables.items() if table}
    for name in option_files.LISTS:
        if name in given:
            given[name] = tuple(given[name])
    if isinstance(given.get("targets"), list):
        given["targets"] = ",".join(given["targets"])
    return given | ({"data": data} if data else {})


def build_parser() -> Parser:
    """Nothing has a default here: what is not given is left to Options, or to the run that is resumed."""
    usual = Options(data="")
    parser = Parser(
        description="Teach FLUX.1 a subject or a style from a few pictures, by LoRA or QLoRA.",
        epilog=SEVERAL,
        argument_default=argparse.SUPPRESS,
    )
    add_data(parser)
    add_networks(parser, usual)
    add_training(parser, usual)
    add_output(parser, usual)
    parser.add_argument("--version", action="version", version=__version__, help="print it and end")
    return parser


def add_data(parser: Parser) -> None:
    """Add the options for the data."""
    add = parser.add_argument_group("what to learn").add_argument
    add("data", nargs="?", metavar="DATA", help="a folder (train.jsonl, metadata.csv, data.toml and others, "
        "or pictures with caption files), one of these files, or a data set of the Hub")  # fmt: skip
    add("--config", metavar="FILE", help="the same, for a data.toml")
    add("--options", metavar="FILE", help="all options in a YAML, TOML or JSON file, by these names or those "
        "of other trainers; the command line goes before it")  # fmt: skip
    add("--check-data", **ON, help="report all that is wrong with the data set, without a model, and end")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its options")

    add = parser.add_argument_group("pictures and captions (a data.toml goes before these)").add_argument
    add("--resolution", type=size, metavar="HxW", help="in pixels; default: the model's; one is a square")
    add("--batch-size", type=count, metavar="N", help="pictures an iteration (default 1)")
    add("--repeats", dest="num_repeats", type=count, metavar="N", help="of every picture an epoch (1)")
    add("--class-prompt", dest="class_tokens", metavar="TEXT", help="caption of pictures that have none")
    add("--caption-column", metavar="NAME", help="of a list or table: where the captions are (default: "
        "prompt, text, caption ...)")  # fmt: skip
    add("--uncaptioned", **ON, help="pictures without a caption are meant; else they are an error")
    add("--buckets", dest="enable_bucket", **ON, help="keep aspect ratios: pictures of several shapes")
    add("--no-upscale", dest="bucket_no_upscale", **ON, help="with --buckets: only ever shrink pictures")
    add("--flip", dest="flip_aug", **ON, help="mirror pictures, by chance")
    add("--color-aug", **ON, help="vary colours a little, a variant a repeat")
    add("--random-crop", **ON, help="crop anywhere rather than in the middle, a variant a repeat")
    add("--shuffle-caption", **ON, help="shuffle the comma-separated tags of captions")
    add("--keep-tokens", type=int, metavar="N", help="but leave the first N (0) in their places")
    add("--caption-dropout", dest="caption_dropout_rate", type=finite, metavar="P", help="drop captions (0)")
    add("--alpha-mask", **ON, help="learn only where pictures are opaque")
    add("--mask-floor", type=finite, metavar="X", help="weight of what a mask covers, 0 (default) to 1; "
        "masks: alpha, x-masklabel.png beside x.jpg, a folder masks")  # fmt: skip
    add("--validation-split", type=finite, metavar="P", help="hold out this share of the pictures (0)")


def add_networks(parser: Parser, usual: Options) -> None:
    """Add the options for the networks that are trained."""
    add = parser.add_argument_group("the model").add_argument
    add("--model", help=f"schnell, dev, krea, tiny, a folder, a Hub repository (default {usual.model})")
    for part in PARTS:
        add(f"--{part}", metavar="FILE", help=f"take the {part} from FILE instead of the model's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, on a CPU float32")
    add("--quantize", nargs="?", const="4", metavar="BITS", help=f"QLoRA: {', '.join(QUANTIZE)} (default 4)")
    add("--adapter", dest="adapters", action="append", type=adapter, metavar="FILE[:X]",
        help="begin with this LoRA, X (1) times as strong; it is not trained further")  # fmt: skip
    add("--fuse-adapter", dest="fuse_adapters", **ON, help="that adapter into the weights, not beside them")

    add = parser.add_argument_group("the adapter").add_argument
    add("--lora-rank", dest="rank", type=count, metavar="N", help=f"default {usual.rank}")
    add("--lora-alpha", dest="alpha", type=finite, metavar="X", help="default: the rank")
    add("--lora-dropout", dest="dropout", type=finite, metavar="P", help="default 0")
    add("--lora-targets", dest="targets", action="append", metavar="WHICH", help=f"{', '.join(TARGETS)}, "
        "layers' names (BFL's, diffusers', kohya's), parts of names or patterns, separated by commas "
        f"(default {usual.targets})")  # fmt: skip
    add("--lora-blocks", dest="last_blocks", type=count, metavar="N", help="only the last N blocks")
    add("--dora", **ON, help="weight-decomposed: a magnitude and a direction")
    add("--train-clip", **ON, help="the CLIP text encoder, too")


def add_training(parser: Parser, usual: Options) -> None:
    """Add the options for the training."""
    add = parser.add_argument_group("training").add_argument
    add("--iterations", type=count, metavar="N", help=f"batches (default {ITERATIONS}); on several "
        "machines, of each")  # fmt: skip
    add("--epochs", type=count, metavar="N", help="rounds of the data set, instead of --iterations")
    add("--grad-accumulate", dest="accumulate", type=count, metavar="N", help="iterations an update (1); "
        "what is left at the end is rounded up to a whole update")  # fmt: skip
    add("--optimizer", choices=optimizers.OPTIMIZERS, help=f"default {usual.optimizer}")
    add("--learning-rate", type=finite, metavar="X", help="default 1e-4; with prodigy 1")
    add("--lr-schedule", dest="schedule", choices=schedules.SCHEDULES, help=f"default {usual.schedule}")
    add("--restarts", type=count, metavar="N", help="of cosine_with_restarts (1)")
    add("--warmup", type=int, metavar="N", help=f"updates (default: a tenth, at most {WARMUP})")
    add("--weight-decay", type=finite, metavar="X", help="default 0.01 with adamw, else 0")
    add("--adam-beta1", type=finite, metavar="X", help="of the gradient's mean (0.9)")
    add("--adam-beta2", type=finite, metavar="X", help="of its square's mean (0.999; lion 0.99)")
    add("--adam-epsilon", type=finite, metavar="X", help="of adam, adamw and prodigy (1e-8)")
    add("--clip-norm", type=finite, metavar="X", help=f"of the gradient, 0: none ({usual.clip_norm:g})")
    add("--ema", type=finite, metavar="X", help="average of the weights, X such as 0.99: saved and shown")
    add("--time-sampling", choices=("auto", *losses.TIME_SAMPLING), help="default: sigmoid; schnell's times")
    add("--time-scale", type=finite, metavar="X", help="spread of sigmoid, shift and flux_shift (1)")
    add("--time-mean", type=finite, metavar="X", help="of logit_normal (0)")
    add("--time-std", type=finite, metavar="X", help="of logit_normal (1)")
    add("--loss", choices=tuple(losses.LOSSES), help=f"default {usual.loss}")
    add("--huber-delta", dest="delta", type=finite, metavar="X", help="of huber and smooth_l1 (0.1)")
    add("--huber-schedule", dest="delta_schedule", choices=DELTA_SCHEDULES, help="of delta over the time")
    add("--guidance", type=finite, metavar="X", help=f"that the model is told ({usual.guidance:g})")
    add("--prior-weight", type=finite, metavar="X", help="of regularisation pictures' loss (1)")
    add("--grad-checkpoint", **ON, help="far less memory for some more time")
    add("--shard-base", **ON, help="on several machines: each keeps a part of the model, and they send each "
        "other its layers, for one that does not fit; with --grad-checkpoint")  # fmt: skip
    add("--seed", type=int, metavar="N", help=f"default {usual.seed}")


def add_output(parser: Parser, usual: Options) -> None:
    """Add the options for what is written."""
    add = parser.add_argument_group("watching").add_argument
    add("--progress-prompt", dest="progress_prompts", action="append", metavar="TEXT",
        help="draw this now and then, always from the same noise; may be given several times")  # fmt: skip
    add("--progress-every", type=count, metavar="N", help=f"iterations ({usual.progress_every})")
    add("--progress-seed", type=int, metavar="N", help=f"default {usual.progress_seed}")
    add("--log-every", type=count, metavar="N", help="iterations from one line to the next where there is no "
        "terminal (default: a twentieth of the run)")  # fmt: skip
    add("--validate-every", type=count, metavar="N", help=f"iterations ({usual.validate_every})")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", help=f"default {usual.output_dir}")
    add("--name", help="of the adapter's files (default adapters, at the end final_adapters)")
    add("--format", choices=tuple(WRITERS), help=f"of the adapter's files (default {usual.format})")
    add("--trigger", metavar="TEXT", help="the words that call the subject: noted in the files")
    add("--save-every", type=count, metavar="N", help="iterations from one adapter file to the next")
    add("--save-every-epochs", type=count, metavar="N", help="epochs from one adapter file to the next")
    add("--state-every", type=count, metavar="N", help="iterations from one state for --resume to the next "
        f"({usual.state_every})")  # fmt: skip
    add("--keep-states", type=count, metavar="N", help=f"states that stay on disk ({usual.keep_states})")
    add("--cache-dir", metavar="DIR", help="of encoded pictures and texts (default: cache in --output-dir)")
