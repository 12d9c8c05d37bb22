"""What the environment that the tests are run in is to have, and what the oldest versions in it cannot do.

A framework that is missing makes its tests fail, unless PVE_TEST_WITHOUT names it: the tests that need it are then left out.
"""

import os
from importlib.metadata import version

WITHOUT = frozenset(os.environ.get("PVE_TEST_WITHOUT", "").replace(",", " ").split())
if WITHOUT - {"torch", "jax"}:
    raise ValueError(f"PVE_TEST_WITHOUT names torch, jax or both, not {' '.join(sorted(WITHOUT))}")

# The tests that import a framework as they are collected, beside this file.
NEEDED_BY = {
    "torch": ["torch_impl", "consistency"],
    "jax": ["jax_impl", "consistency"],
}

# What is promised from a version on only: the versions before, which are supported otherwise, fail these tests. For torch,
# 2.13 is the first version after 2.6 that they were run with. A name without [parameters] stands for all of them.
SINCE = [
    (
        "jax",
        (0, 9),
        "vmap of a psum inside a shard_map raises a TypeError",
        [
            "jax_impl/test_gradients.py::test_vmap_scan_and_checkpoint[Auto-all_reduce-auto-bfloat16]",
            "jax_impl/test_gradients.py::test_vmap_scan_and_checkpoint[Explicit-all_reduce-auto-bfloat16]",
        ],
    ),
    (
        "jax",
        (0, 9, 2),
        "jit does not return an empty array that is split over an Explicit axis",
        [f"jax_impl/test_reductions.py::test_no_tokens[Explicit-mode{number}]" for number in (0, 2, 3)],
    ),
    (
        "torch",
        (2, 13),
        "fully_shard does not run on CPUs: their streams record no events",
        [
            "torch_impl/test_accumulation.py::test_ddp_is_refused_and_fully_shard_works",
            "torch_impl/test_composition.py::test_data_parallelism_over_the_other_dimension[fsdp]",
            "torch_impl/test_further_split.py::test_checkpoints_and_files_hold_the_right_rows",
            "torch_impl/test_further_split.py::test_reset_parameters_draws_the_same_numbers_and_padding_has_no_gradient",
            "torch_impl/test_zero_row.py::test_fully_shard_leaves_no_memory_behind",
            "torch_impl/test_clipping.py::test_training_follows_the_unsharded_model[ours-device_mesh-2.0]",
            "torch_impl/test_clipping.py::test_training_follows_the_unsharded_model[ours-process_group-1.0]",
            "torch_impl/test_clipping.py::test_training_follows_the_unsharded_model[ours-process_group-2.0]",
            "torch_impl/test_clipping.py::test_training_follows_the_unsharded_model[ours-process_group-inf]",
            "torch_impl/test_lm_head.py::test_four_ranks[check_fsdp]",
            "torch_impl/test_vocab_parallel.py::test_a_model_on_the_meta_device",
        ],
    ),
    (
        "torch",
        (2, 13),
        "the norm of a DTensor is rounded to float32",
        ["torch_impl/test_clipping.py::test_training_follows_the_unsharded_model[torch's own-device_mesh-2.0]"],
    ),
    (
        "torch",
        (2, 13),
        "dcp.load has no no_dist, parallelize_module no src_data_rank, fully_shard no ignored_params",
        [
            "torch_impl/test_checkpoint.py::test_adams_moments_for_any_number_of_ranks",
            "torch_impl/test_composition.py::test_data_parallelism_over_tensor_ranks_is_refused[fsdp-False]",
            "torch_impl/test_documentation.py::test_documentation",
            "torch_impl/test_vocab_parallel.py::test_without_a_source_each_rank_keeps_its_own_rows",
        ],
    ),
    (
        "torch",
        (2, 13),
        "inductor writes C++ that does not compile for a view of bfloat16 as integers",
        [
            "torch_impl/test_transforms.py::test_compiled_rows_are_bits_and_16_bit_gradients_do_not_saturate",
        ],
    ),
    (
        "torch",
        (2, 13),
        "torch.compile makes a graph of its own for every rank",
        ["torch_impl/test_transforms.py::test_compiled_graphs_are_the_same_on_every_rank"],
    ),
    (
        "torch",
        (2, 13),
        "torch.compile does not hand on the message of an error",
        [
            "torch_impl/test_accumulation.py::test_hooks_and_what_is_not_eager_are_refused",
            "torch_impl/test_transforms.py::test_compiled_sparse_gradients_are_refused",
        ],
    ),
    (
        "torch",
        (2, 13),
        "torch.export loses the symbolic size of what an autograd.Function is given",
        ["torch_impl/test_transforms.py::test_exported_for_any_number_of_ids"],
    ),
    (
        "torch",
        (2, 13),
        "small allocations are counted that do not depend on this package",
        [
            "torch_impl/test_accumulation.py::test_a_step_costs_the_tokens_not_the_table",
            "torch_impl/test_counts.py::test_a_dense_gradient_is_allocated_once_and_a_sparse_one_is_small",
        ],
    ),
]


def left_out() -> list[str]:
    """The tests that need a framework which is missing on purpose."""
    return sorted({tests for framework in WITHOUT for tests in NEEDED_BY[framework]})


def reason_to_skip(node_id: str) -> str | None:
    """Why a test is skipped with the versions that are installed; None: it is run."""
    name = node_id.removeprefix("tests/")
    for framework, since, why, tests in SINCE:
        listed = name in tests or name.partition("[")[0] in tests
        if listed and framework not in WITHOUT and installed(framework) < since:
            return f"{framework} before {'.'.join(map(str, since))}: {why}"
    return None


def installed(framework: str) -> tuple[int, ...]:
    """The version, in numbers; an alpha or a build counts as its release."""
    release = version(framework).partition("+")[0].split(".")
    return tuple(int(part) for part in release[:3] if part.isdecimal())
