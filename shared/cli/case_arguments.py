"""Options that several subcommands share."""

import argparse
from pathlib import Path

from shared.bits import DTYPES
from shared.checks import EXCHANGES, REDUCTIONS
from shared.padding_rules import RULE_HELP
from shared.proof.case import CaseOptions

__all__ = ["add_case_arguments", "case_options", "dtype_name"]

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def dtype_name(text: str) -> str:
    """Expand short names of dtypes, such as ``bf16``."""
    return _SHORT_DTYPES.get(text, text)


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of table, ids and layer to a command."""
    table = parser.add_argument_group("table (default: a generated one of 131072 x 1024, bfloat16)")
    table.add_argument("--weights", type=Path, metavar="FILE", help="safetensors file, checkpoint or folder of parts")
    table.add_argument("--tensor", metavar="NAME", help="tensor in it (default: the one named like an input embedding)")
    table.add_argument(
        "--vocab-size", type=int, metavar="V", help="rows of a generated table; of parts, without padding"
    )
    table.add_argument("--emb-size", type=int, metavar="E", help="columns of a generated table")
    table.add_argument(
        "--dtype", type=dtype_name, choices=[*DTYPES], help="of a generated table; with --weights, dtype to cast to"
    )

    ids = parser.add_argument_group("ids (default: generated Zipf-distributed ones, 4 x 2048)")
    ids.add_argument("--ids", type=Path, metavar="FILE.npy", help="array of integers, of any shape")
    ids.add_argument("--tokenizer", type=Path, metavar="tokenizer.json", help="tokenizer for --text")
    ids.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to tokenise, with --tokenizer")

    layer = parser.add_argument_group("layer")
    layer.add_argument(
        "--world-size", type=int, default=8, metavar="W", help="ranks (default 8); must divide V after padding"
    )
    layer.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
    layer.add_argument("--padding-idx", type=int, metavar="ID", help="id whose row gets no gradient")
    layer.add_argument(
        "--reduction",
        choices=[*REDUCTIONS],
        default="none",
        help="what each rank returns: its incomplete embedding (none, the default), the embedding (all_reduce), its part of "
        "the sequence (reduce_scatter), or the embedding of its own part of the ids (all_to_all)",
    )
    layer.add_argument(
        "--exchange",
        choices=[*EXCHANGES],
        default="auto",
        help="how rows travel in a reduction: by a collective (dense), from their owner to the ranks that need them "
        "(routed), or as the layer chooses (auto, the default); values are equal",
    )
    layer.add_argument(
        "--seq-dim", type=int, metavar="D", help="dimension of the ids that reduce_scatter or all_to_all splits"
    )
    layer.add_argument("--seed", type=int, default=0, metavar="S", help="seed of all that is generated (default 0)")


def case_options(options: argparse.Namespace) -> CaseOptions:
    """Convert parsed options to ``CaseOptions``."""
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    if options.seq_dim is None:
        options.seq_dim = -1
    elif options.reduction == "none":
        raise ValueError("--seq-dim needs a reduction that splits the ids, got none: add --reduction reduce_scatter")
    return CaseOptions(**{name: getattr(options, name) for name in CaseOptions.__dataclass_fields__})
