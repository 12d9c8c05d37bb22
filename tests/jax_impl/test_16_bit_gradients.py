"""16-bit gradients: exact sums in float32, under all of JAX's transforms.

Terms are integers small enough that sums are exact in any order: bits are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition
from shared.proof.oracle import weight_grad

VOCAB, EMB = 2048, 6
DTYPES = [jnp.float16, jnp.bfloat16]
# Repeated ids, neighbours at the ranks' borders, and ids that nobody has.
IDS = np.concatenate([[-1, 0, 0, 1, 511, 512, 513, 2047, 2048, 2**31 - 1], np.full(22, 700), np.arange(1020, 1028)])


@pytest.fixture(params=["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def kind(request):
    return request.param


def layer(mesh, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, mesh, **options)


def oracle(ids, grad_output, padding_idx=None):
    return weight_grad(np.asarray(grad_output), ids, VocabPartition(VOCAB, 1), 0, padding_idx)


def integers(rng, dtype, shape=(40, EMB)):
    return jnp.asarray(rng.integers(-7, 8, shape), dtype)


def loss(emb, ids, grad_output):
    """Linear in the table, with ``grad_output`` for the embedding's gradient."""
    output = emb(ids)
    if emb.reduction == "none":
        output = output.sum(axis=0, dtype=jnp.float32)
    return (output.astype(jnp.float32) * grad_output.astype(jnp.float32)).sum()


@pytest.mark.parametrize(("dtype", "padding_idx"), [(jnp.float16, None), (jnp.bfloat16, 700)])
@pytest.mark.parametrize(
    ("reduction", "exchange"),
    [("none", "auto"), ("all_reduce", "dense"), ("reduce_scatter", "dense"), ("reduce_scatter", "routed")],
)
def test_the_gradient_is_the_oracles(mesh_of, rng, reduction, exchange, padding_idx, dtype):
    emb = layer(mesh_of((4,)), dtype=dtype, reduction=reduction, exchange=exchange, padding_idx=padding_idx)
    grad_output = integers(rng, dtype)
    if reduction == "reduce_scatter":
        grad_output = jax.device_put(grad_output, NamedSharding(emb.mesh, P("tp", None)))
    found = jax.jit(jax.grad(loss))(emb, IDS, grad_output)
    assert found.weight.dtype == dtype
    assert found.weight.sharding.is_equivalent_to(emb.weight.sharding, 2)
    np.testing.assert_array_equal(found.weight, oracle(IDS, grad_output, padding_idx))


@pytest.mark.parametrize("dtype", DTYPES)
def test_5000_equal_ids_do_not_saturate(mesh_of, dtype):
    emb = ParallelVocabEmbedding(40000, 2, mesh_of((2,)), dtype=dtype, reduction="all_reduce")
    grad = jax.jit(jax.grad(lambda emb: emb(np.full(5000, 39999)).astype(jnp.float32).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[39999], np.asarray(5000, dtype))
    assert not np.asarray(grad)[:39999].any()


def test_sums_round_once(mesh_of):
    emb = layer(mesh_of((2,)), dtype=jnp.bfloat16, reduction="all_reduce")
    terms = jnp.asarray([256, 1, 1, 1], jnp.bfloat16)[:, None]  # 258 is rounded twice on the way, 259 -> 260 once
    grad = jax.jit(jax.grad(loss))(emb, np.full(4, 3), terms).weight
    assert (np.asarray(grad)[3] == 260).all()


@pytest.mark.parametrize("reduction", ["none", "all_reduce"])
def test_not_a_number_reaches_only_its_row(mesh_of, rng, reduction):
    emb = layer(mesh_of((4,)), dtype=jnp.bfloat16, reduction=reduction)
    grad_output = integers(rng, jnp.bfloat16).at[3].set(jnp.nan).at[0].set(jnp.inf)  # of id 1, and of nobody's

    @jax.jit
    def pull_back(emb):
        output, back = jax.vjp(lambda emb: emb(IDS), emb)
        return back(jnp.broadcast_to(grad_output, output.shape, out_sharding=jax.typeof(output).sharding))[0].weight

    found = np.asarray(pull_back(emb)).astype(np.float32)
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("padding_idx", [None, 700])
def test_forward_mode_and_second_order(mesh_of, rng, padding_idx):
    emb = layer(mesh_of((4,)), dtype=jnp.bfloat16, reduction="all_reduce", padding_idx=padding_idx)
    direction = jax.tree.map(lambda t: jnp.round(4 * t), emb)
    _, tangent = jax.jvp(lambda emb: emb(IDS), (emb,), (direction,))
    expected = jax.jit(lambda emb: emb(IDS))(direction)
    if padding_idx is not None:
        expected = jnp.where((padding_idx == IDS)[:, None], 0, expected)
    np.testing.assert_array_equal(tangent, expected)

    # Of sum(E**2) / 2 the gradient of a row is its occurrences times the row, and so is the Hessian times a direction.
    def half_square(emb):
        return (emb(IDS).astype(jnp.float32) ** 2).sum() / 2

    counts = np.bincount(IDS[(IDS >= 0) & (IDS < VOCAB)], minlength=VOCAB)
    if padding_idx is not None:
        counts[padding_idx] = 0
    expected = (counts[:, None] * np.asarray(direction.weight).astype(np.float32)).astype(jnp.bfloat16)
    forward_over_reverse = jax.jit(lambda emb, d: jax.jvp(jax.grad(half_square), (emb,), (d,))[1].weight)
    np.testing.assert_array_equal(forward_over_reverse(emb, direction), expected)

    @jax.jit
    def reverse_over_reverse(emb, direction):
        dot = lambda emb: (jax.grad(half_square)(emb).weight * direction.weight).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(dot)(emb).weight

    np.testing.assert_array_equal(reverse_over_reverse(emb, direction), expected)


def test_per_sample_gradients_scan_and_checkpoint(mesh_of, rng):
    emb = layer(mesh_of((2,)), dtype=jnp.bfloat16, reduction="all_reduce")
    batches, grad_outputs = np.stack([IDS, IDS[::-1]]), integers(rng, jnp.bfloat16, (2, len(IDS), EMB))
    expected = [oracle(ids, grad) for ids, grad in zip(batches, grad_outputs, strict=True)]
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(emb, batches, grad_outputs)
    np.testing.assert_array_equal(each.weight, expected)
    # The derivative of what is batched, and the batch of what is derived twice.
    together = jax.jit(jax.grad(lambda emb: jax.vmap(loss, (None, 0, 0))(emb, batches, grad_outputs).sum()))(emb)
    both = (expected[0].astype(np.float32) + expected[1].astype(np.float32)).astype(expected[0].dtype)
    np.testing.assert_array_equal(together.weight, both)

    @jax.jit
    def scanned(emb):
        def step(total, batch):
            return total + jax.checkpoint(loss)(emb, *batch), None

        return jax.lax.scan(step, jnp.zeros(()), (jnp.asarray(batches), grad_outputs))[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(scanned))(emb).weight, both)


def test_without_jit(mesh_of, rng):
    emb = layer(mesh_of((2,)), dtype=jnp.float16, reduction="all_reduce")
    grad_output = integers(rng, jnp.float16)
    np.testing.assert_array_equal(jax.grad(loss)(emb, IDS, grad_output).weight, oracle(IDS, grad_output))
