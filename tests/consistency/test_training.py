"""A small model trained with this embedding follows the unsharded run, in both frameworks, and they follow each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.distributed as dist
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch_layers import MODES

from jax_impl import ParallelVocabEmbedding as JaxEmbedding
from torch_impl import ParallelVocabEmbedding as TorchEmbedding

VOCAB, EMB, OUT, STEPS, RATE = 64, 8, 5, 30, 0.05


def problem():
    """A table, a projection, and for each step ids and what to predict."""
    rng = np.random.default_rng(0)
    table, projection = rng.standard_normal((VOCAB, EMB)), rng.standard_normal((EMB, OUT)) / 3
    ids = np.minimum(rng.zipf(1.3, (STEPS, 4, 8)) - 1, VOCAB - 1)
    wanted = np.tanh(rng.standard_normal((VOCAB, OUT)))[ids]
    return table.astype(np.float32), projection.astype(np.float32), ids, wanted.astype(np.float32)


def train_torch(reduction=None, exchange="auto"):
    """The losses of ``STEPS`` steps: with ``nn.Embedding``, or on every rank of the world with this layer."""
    table, projection, ids, wanted = map(torch.from_numpy, problem())
    if reduction is None:
        emb, rank, world_size = torch.nn.Embedding(VOCAB, EMB), 0, 1
        rows = table
    else:
        emb = TorchEmbedding(VOCAB, EMB, process_group=dist.group.WORLD, reduction=reduction, exchange=exchange)
        rank, world_size = emb.rank, emb.world_size
        rows = table.chunk(world_size)[rank]
    emb.load_state_dict({"weight": rows})
    out = torch.nn.Parameter(projection.clone())
    steps, losses = torch.optim.Adam([emb.weight, out], lr=RATE), []
    scattered = reduction == "reduce_scatter"
    for step in range(STEPS):
        target = wanted[step].chunk(world_size, dim=1)[rank] if scattered else wanted[step]
        loss = (emb(ids[step]) @ out - target).square().sum() / wanted[step].numel()
        steps.zero_grad()
        loss.backward()
        loss = loss.detach()
        if scattered:  # each rank has a part of the sequence, and so of the loss and of what projects it
            dist.all_reduce(loss)
            dist.all_reduce(out.grad)
        steps.step()
        losses.append(loss.item())
    return losses


def train_jax(reduction=None, exchange="auto"):
    """The same in JAX, over four devices."""
    table, projection, ids, wanted = problem()
    mesh = jax.make_mesh((4,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    emb = table
    if reduction is not None:
        emb = JaxEmbedding(VOCAB, EMB, mesh, reduction=reduction, exchange=exchange).with_weight(table)
    optimizer = optax.adam(RATE)

    def loss_of(parameters, ids, wanted):
        emb, out = parameters
        embedded = jnp.take(emb, ids, axis=0) if reduction is None else emb(ids)
        return ((embedded @ out - wanted) ** 2).sum() / wanted.size

    @jax.jit
    def train_step(parameters, moments, ids, wanted):
        loss, gradient = jax.value_and_grad(loss_of)(parameters, ids, wanted)
        updates, moments = optimizer.update(gradient, moments)
        return loss, optax.apply_updates(parameters, updates), moments

    replicated = NamedSharding(mesh, P())
    parameters = emb, jax.device_put(projection, replicated)
    moments, losses = optimizer.init(parameters), []
    for step in range(STEPS):
        batch = jax.device_put((ids[step].astype(np.int32), wanted[step]), replicated)
        loss, parameters, moments = train_step(parameters, moments, *batch)
        losses.append(float(loss))
    return losses


def assert_follows(losses, expected, exactly, note):
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2, "the run learns something"
    if exactly:
        assert losses == expected, note
    else:
        # Float32 sums of some hundred terms in another order: a few roundings a step (2**-24 each), carried through 30
        # steps that each pass an error on by about its own size, and through Adam's quotient of small numbers.
        np.testing.assert_allclose(losses, expected, rtol=2e-4, err_msg=str(note))


@pytest.mark.slow
def test_training_follows_the_unsharded_run(world):
    torch_losses, jax_losses = train_torch(), train_jax()
    np.testing.assert_allclose(torch_losses, jax_losses, rtol=2e-4)
    found = {}
    for mode in MODES:
        ranks = world(4)(train_torch, *mode)
        assert all(losses == ranks[0] for losses in ranks), "all ranks see the same loss"
        # With all_reduce every rank adds up a row's gradients in the order of the tokens, as nn.Embedding does.
        assert_follows(ranks[0], torch_losses, mode[0] == "all_reduce", ("torch", *mode))
        losses = train_jax(*mode)
        assert_follows(losses, jax_losses, False, ("jax", *mode))
        np.testing.assert_allclose(ranks[0], losses, rtol=2e-4, err_msg=str(mode))
        found[mode] = ranks[0], losses
    # The exchange never changes a bit in torch, whatever the sums.
    assert found[MODES[0]][0] == found[MODES[1]][0]
    assert found[MODES[2]][0] == found[MODES[3]][0]
