"""Every option, declared and validated once."""

import dataclasses

import numpy as np
import pytest

from shared import EmbeddingConfig, VocabPartition
from shared.config import LOOKUP_OPTIONS, OPTIONS


def test_it_holds_the_partition_and_plain_values():
    config = EmbeddingConfig(
        np.int64(10), 4, world_size=4, padded_vocab_size="even", init_mean=1, reduction=np.str_("all_reduce")
    )
    assert config.partition == VocabPartition(10, 4, 12)
    assert (config.padded_vocab_size, config.reduction) == (12, "all_reduce")
    assert [type(each) for each in (config.vocab_size, config.init_mean, config.reduction)] == [int, float, str]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.reduction = "none"


def test_what_only_construction_needs_takes_no_part_in_equality():
    config = EmbeddingConfig(12, 4, world_size=3)
    for name, value in {"init_mean": 2.0, "init_std": 0.1, "init_base_seed": 0, "init": print, "check": True}.items():
        other = dataclasses.replace(config, **{name: value})
        assert (other == config, hash(other) == hash(config)) == (True, True), name
        assert name not in LOOKUP_OPTIONS
    for name, value in {"reduction": "all_reduce", "seq_dim": 0, "padding_idx": 0, "sparse": True}.items():
        assert dataclasses.replace(config, **{name: value}) != config, name
    facts = config.agreement()
    assert tuple(facts) == LOOKUP_OPTIONS
    assert (facts["vocab_size"], facts["padding_idx"], facts["sparse"]) == ("12", "None", "False")


def test_changes_are_what_differs_from_the_defaults():
    assert EmbeddingConfig(12, 4, world_size=3, padded_vocab_size=12).changes() == {}
    config = EmbeddingConfig(10, 4, world_size=4, padded_vocab_size=16, padding_idx=0, check=True)
    assert config.changes() == {"padded_vocab_size": 16, "padding_idx": 0, "check": True}
    assert EmbeddingConfig(10, 4, 4, **config.changes()).as_dict() == config.as_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 3, "init_std": 1e-300, "init_base_seed": -(2**63)},
        {"reduction": "reduce_scatter", "seq_dim": 0},
        {"reduction": np.str_("all_reduce")},
    ],
)
def test_the_text_reads_back(options):
    config = EmbeddingConfig(12, 4, world_size=3, **options)
    again = EmbeddingConfig.from_text(config.text)
    assert (again, again.as_dict(), again.text) == (config, config.as_dict(), config.text)
    assert tuple(again.as_dict()) == OPTIONS


@pytest.mark.parametrize("init", [None, len])
def test_what_is_no_word_is_kept_beside_the_text(init):
    config = EmbeddingConfig(12, 4, init=init)
    assert (config.init, config.changes()) == (init, {"init": init})
    again = EmbeddingConfig.from_text(config.text)
    assert (again, again.init) == (config, None)


REDUCTIONS = "'none' or 'all_reduce' or 'reduce_scatter' or 'all_to_all'"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"vocab_size": 13}, ValueError, "vocab_size=13 over world_size=3 .* next size that divides is 15"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": 24.0}, TypeError, "vocab_size must be an integer"),
        ({"emb_size": 0}, ValueError, "emb_size must be at least 1, got 0"),
        ({"reduction": "sum"}, ValueError, f"reduction must be {REDUCTIONS}, got 'sum'"),
        ({"exchange": "p2p"}, ValueError, "exchange must be"),
        ({"seq_dim": 1.0}, TypeError, "seq_dim must be an integer"),
        ({"invalid_ids": "wrap"}, ValueError, "invalid_ids must be 'zero' or 'error', got 'wrap'"),
        ({"padding_idx": 12}, ValueError, r"padding_idx must be an id .* \[0, 12\), got 12"),
        ({"padding_idx": -1}, ValueError, "padding_idx must be an id"),
        ({"padding_idx": 1.0}, TypeError, "padding_idx must be an integer"),
        ({"sparse": 1}, TypeError, "sparse must be True or False"),
        ({"check": "yes"}, TypeError, "check must be True or False"),
        ({"sparse": True, "gradient_accumulation_fusion": True}, ValueError, "must be False with sparse=True"),
        ({"init_std": -1}, ValueError, "init_std must not be negative"),
        ({"init_std": "1e"}, TypeError, "init_std must be a number"),
        ({"init_mean": float("nan")}, ValueError, "init_mean must be finite"),
        ({"init_mean": float("inf")}, ValueError, "init_mean must be finite"),
        ({"init_base_seed": 1.5}, TypeError, "init_base_seed must be an integer"),
        ({"init_base_seed": 2**63}, ValueError, "init_base_seed must keep"),
        ({"init": "ones"}, ValueError, "init must be 'per_rank' or 'global', a callable or None, got 'ones'"),
    ],
)
def test_options_out_of_range_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        EmbeddingConfig(**{"vocab_size": 12, "emb_size": 4, "world_size": 3, **options})
