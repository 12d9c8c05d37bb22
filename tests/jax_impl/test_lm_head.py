"""The head as a pytree: tied and not, in Auto and Explicit meshes, beside data axes, and under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import make_mesh, on

from jax_impl import ParallelLMHead, ParallelVocabEmbedding, linear_cross_entropy
from shared.head import LossOptions
from shared.proof import head_oracle

V, E = 21, 8


def case():
    rng = np.random.default_rng(0)
    table = np.pad(rng.standard_normal((V, E)).astype(np.float32), ((0, 24 - V), (0, 0)))
    hidden, targets = rng.standard_normal((4, 8, E)).astype(np.float32), rng.integers(0, V, (4, 8))
    targets[0, :5], targets[3, 0] = -100, -100
    return hidden, table, targets


def head_of(mesh, table, **options):
    return ParallelLMHead(ParallelVocabEmbedding.from_embedding(table[:V], mesh, padded_vocab_size=24), **options)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "seq_dim", "options"),
    [
        ((2, 4), None, {"label_smoothing": 0.1, "softcap": 2.0}),
        slower((2, 4), -1, {"reduction": "none", "z_loss": 0.1}),
        slower((4,), -1, {}),
    ],
    ids=str,
)
def test_loss_and_gradients(mesh_of, shape, seq_dim, options):
    """Eagerly and under jit, whatever is known of how tokens are split over data."""
    mesh = mesh_of(shape, ("dp", "tp")[-len(shape) :])
    hidden, table, targets = case()
    head, known = head_of(mesh, table, seq_dim=seq_dim, **options), LossOptions(**options)
    upstream = np.float32(0.5) if known.reduction == "mean" else np.full((4, 8), 0.5, np.float32)
    expected = head_oracle.loss(hidden, table, targets, V, known, upstream)
    given = on(mesh, hidden, "dp" if len(shape) > 1 else None, None if seq_dim is None else "tp")

    def step(head, hidden):
        (loss, count), pull_back = jax.vjp(lambda head, h: head(h, targets, returns=("count",)), head, hidden)
        return loss, count, pull_back((jnp.full_like(loss, 0.5), np.zeros((), jax.dtypes.float0)))

    loss, count, (of_head, of_hidden) = jax.jit(step)(head, given)
    close(loss, expected.loss)
    assert count == expected.count
    close(of_hidden, expected.hidden_grad)
    close(of_head.embedding.weight, expected.weight_grad)
    loss, pull_back = jax.vjp(lambda head: head(given, targets), head)
    close(loss, expected.loss)
    close(pull_back(jnp.full_like(loss, 0.5))[0].embedding.weight, expected.weight_grad)


@pytest.mark.slow
def test_scan_and_checkpoint(mesh_of):
    hidden, table, targets = case()
    head = head_of(mesh_of((2, 4), ("dp", "tp")), table)

    def in_a_scan(head, hidden):
        total, _ = jax.lax.scan(lambda total, h: (total + jax.checkpoint(head)(h, targets), None), 0.0, hidden)
        return total

    gradient = jax.jit(jax.grad(in_a_scan))(head, jnp.stack([hidden, hidden]))
    close(gradient.embedding.weight, 2 * head_oracle.loss(hidden, table, targets, V).weight_grad)


def test_logits_and_decoding(mesh_of):
    mesh, (hidden, table, _) = mesh_of((2, 4), ("dp", "tp")), case()
    head = head_of(mesh, table, softcap=3.0)
    logits = head(hidden)
    assert logits.sharding.spec[-1] == "tp"
    close(logits, head_oracle.logits(hidden, table, V, 3.0))
    uniform = np.random.default_rng(1).random((4, 8), np.float32)

    def decode(head, logits):
        return head.argmax(logits), *head.top_k(logits, 5), head.sample(logits, uniform)

    values, ids = head_oracle.top_k(np.asarray(logits), 5, V)
    expected = ids[..., 0], values, ids, head_oracle.sample(np.asarray(logits), uniform, V)
    for run in (decode, jax.jit(decode)):
        for found, each in zip(run(head, logits), expected, strict=True):
            np.testing.assert_array_equal(found, each)


def test_a_tied_table_gets_both_gradients(mesh_of):
    _, table, targets = case()
    emb = ParallelVocabEmbedding.from_embedding(table[:V], mesh_of((4,)), padded_vocab_size=24, reduction="all_reduce")
    ids = np.abs(targets) % V

    @jax.jit
    def gradients(emb):
        apart = jax.grad(lambda emb, head: head(emb(ids), targets), (0, 1))(emb, ParallelLMHead(emb))
        return jax.grad(lambda emb: ParallelLMHead(emb)(emb(ids), targets))(emb), apart

    gradient, (of_lookup, of_head) = gradients(emb)
    assert jax.tree.structure(gradient) == jax.tree.structure(emb)
    close(gradient.weight, np.asarray(of_lookup.weight) + np.asarray(of_head.embedding.weight))


def test_invalid_targets():
    hidden, table, targets = case()
    head = head_of(make_mesh(), table, reduction="none")
    bad = targets.copy()
    bad[1, 2], bad[2, 2] = 2**32 + 5, V  # neither another id nor a row of padding
    with pytest.raises(IndexError, match=r"targets\[1, 2\] = 4294967301 is outside the vocabulary \[0, 21\)"):
        head(hidden, bad)
    narrow = jnp.asarray(np.where(bad > V, -7, bad).astype(np.int32))
    with pytest.raises(IndexError, match=r"targets\[1, 2\] = -7 is outside the vocabulary \[0, 21\)"):
        jax.jit(lambda head: head(hidden, narrow))(head)  # closed over: known while tracing
    loss = np.asarray(jax.jit(head)(hidden, narrow))
    assert np.array_equal(np.isnan(loss), (narrow < 0) & (targets >= 0) | (narrow == V))
    error, _ = jax.jit(checkify.checkify(head))(hidden, narrow)
    with pytest.raises(checkify.JaxRuntimeError, match=r"targets\[1, 2\] = -7 is outside the vocabulary \[0, 21\)"):
        error.throw()
    lenient = ParallelLMHead(head.embedding, invalid_targets="ignore", reduction="none")
    np.testing.assert_array_equal(lenient(hidden, bad) == 0, (bad < 0) | (bad >= V))


def test_what_is_refused():
    hidden, table, targets = case()
    head = head_of(make_mesh((2, 2), ("dp", "tp")), table)
    assert repr(ParallelLMHead(head.embedding, softcap=2.0)).endswith(", softcap=2.0)")
    with pytest.raises(TypeError, match="embedding must be a ParallelVocabEmbedding, got ndarray"):
        ParallelLMHead(table)
    with pytest.raises(ValueError, match="targets must be one a token"):
        head(hidden, targets[:2])
    with pytest.raises(ValueError, match="returns must be empty without targets"):
        head(hidden, returns=("lse",))
    with pytest.raises(ValueError, match="check_vma must be True"):
        jax.shard_map(
            lambda h, w: linear_cross_entropy(h, w, targets, head.partition),
            mesh=head.embedding.mesh,
            in_specs=(P(), P("tp")),
            out_specs=P(),
            check_vma=False,
        )(hidden, head.embedding.weight)
