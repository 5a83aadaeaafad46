"""`python -m flux.weights`: models as files.

python -m flux.weights quantize dev dev-4bit                 # then: txt2image.py --model dev-4bit
python -m flux.weights quantize dev dev-8bit --bits 8
"""

import argparse
import sys
from pathlib import Path

import flux  # noqa: F401  before mlx.core, so that OpenBLAS is there first

# isort: split
import mlx.core as mx

from flux.arguments import Parser, described, run_program
from flux.distributed.ranks import Ranks
from flux.weights import checkpoints, quantize, save
from flux.weights.layouts import PARTS


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Run the command that the command line names."""
    args = build_parser().parse_args()
    return args.run(args)


def build_parser() -> Parser:
    """The command line."""
    parser = described(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help = "write a model with the transformer's and T5's blocks in few bits"
    add = commands.add_parser("quantize", help=help, description=help).add_argument
    add("model", help="as --model of txt2image.py: a name, a folder, a file, owner/name[:FILE]")
    add("output", type=Path, metavar="FOLDER", help="where the model is written, in BFL's layout")
    add("--bits", choices=quantize.KINDS, default="4", help="of a weight (default 4)")
    add("--t5-bits", choices=quantize.KINDS, help="of T5's weights (default: as --bits)")
    add("--group-size", type=int, choices=(32, 64, 128), help="weights that share a scale (default 64)")
    for part in PARTS:
        add(f"--{part}", metavar="FILE", help=f"take the {part} from FILE instead of the model's")
    parser.set_defaults(run=run_quantize)
    return parser


def run_quantize(args: argparse.Namespace) -> int:
    """Write the quantized model; the exit status. Layers are quantized one by one as they are written."""
    checkpoint = checkpoints.find(args.model, **{part: getattr(args, part) for part in PARTS})
    flow, t5 = checkpoint.load_flux(mx.bfloat16), checkpoint.load_t5(mx.bfloat16)
    for name, network, kind in (("transformer", flow, args.bits), ("T5", t5, args.t5_bits or args.bits)):
        bits, mode = quantize.read_kind(kind)
        quantize.quantize(network, bits, args.group_size if mode == "affine" else None, mode)
        print(quantize.report(kind, **{name: network}), file=sys.stderr)
    model = save.Model(
        flow,
        checkpoint.load_ae(mx.bfloat16),
        checkpoint.load_clip(mx.bfloat16),
        t5,
        checkpoint.clip_tokenizer,
        checkpoint.t5_tokenizer,
        checkpoint.spec,
    )
    save.save_bfl(args.output, model)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
