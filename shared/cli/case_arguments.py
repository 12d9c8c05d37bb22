"""The options that say which case to run."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.bits import DTYPES
from shared.checks import EXCHANGES, REDUCTIONS
from shared.padding_rules import RULE_HELP
from shared.proof.case import CaseOptions

__all__ = ["add_case_arguments", "case_options", "dtype_name"]

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def dtype_name(text: str) -> str:
    """The name of a dtype, of which ``bf16`` and its like are short forms."""
    return _SHORT_DTYPES.get(text, text)


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that say which table, which ids and which layer."""
    table = parser.add_argument_group("the table (left out: a made-up one of 131072 x 1024, bfloat16)")
    table.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="safetensors file with the table, or a folder with a Hugging Face checkpoint",
    )
    table.add_argument(
        "--tensor", metavar="NAME", help="the tensor; left out, the one that looks like an input embedding"
    )
    table.add_argument("--vocab-size", type=int, metavar="V", help="rows of a made-up table")
    table.add_argument("--emb-size", type=int, metavar="E", help="columns of a made-up table")
    table.add_argument(
        "--dtype", type=dtype_name, choices=[*DTYPES], help="of a made-up table; with --weights, what to cast it to"
    )

    ids = parser.add_argument_group("the ids (left out: made-up Zipf-distributed ones, 4 x 2048)")
    ids.add_argument("--ids", type=Path, metavar="FILE.npy", help="an array of integers, of any shape")
    ids.add_argument("--tokenizer", type=Path, metavar="tokenizer.json", help="with --text: how to turn it into ids")
    ids.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text file")

    layer = parser.add_argument_group("the layer")
    layer.add_argument(
        "--world-size", type=int, default=8, metavar="W", help="ranks; must divide V, padded or not (default 8)"
    )
    layer.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
    layer.add_argument("--padding-idx", type=int, metavar="ID", help="an id whose row gets no gradient")
    layer.add_argument(
        "--reduction",
        choices=[*REDUCTIONS],
        default="none",
        help="what the ranks return: their incomplete embeddings (none, the default), the embedding (all_reduce), each its "
        "part of the sequence (reduce_scatter), or the rows of its own ids, of which it passes a part (all_to_all). torch "
        "then runs a process per rank, JAX a device",
    )
    layer.add_argument(
        "--exchange",
        choices=[*EXCHANGES],
        default="auto",
        help="how a reduction's rows travel: by the dense collective, routed from their owner to who needs them, or "
        "what each layer chooses by itself (auto, the default); the values are the same",
    )
    layer.add_argument(
        "--seq-dim",
        type=int,
        metavar="D",
        help="with --reduction reduce_scatter or all_to_all: the dimension of the ids that is split (default -1)",
    )
    layer.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is made up (default 0)")


def case_options(options: argparse.Namespace) -> CaseOptions:
    """What the user said with them."""
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    if options.seq_dim is None:
        options.seq_dim = -1
    elif options.reduction == "none":
        raise ValueError("--seq-dim needs --reduction reduce_scatter, got none: nothing is split without a reduction")
    return CaseOptions(**{name: getattr(options, name) for name in CaseOptions.__dataclass_fields__})
