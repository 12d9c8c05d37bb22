"""The head's functions as PyTorch's: autograd, transforms, what is refused, sent and allocated."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch_layers import assert_refused

from shared import VocabPartition
from torch_impl import (
    linear_cross_entropy,
    parallel_argmax,
    parallel_cross_entropy,
    parallel_logits,
    parallel_sample,
    parallel_top_k,
)

V, E, TOKENS = 21, 8, (3, 8)
ALONE, HALVES = VocabPartition(V, 1, 24), VocabPartition(V, 2, 24)


def tensors(dtype=torch.float64):
    """Hidden states, a table and targets, of which one is ignored."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, E, dtype=dtype, requires_grad=True) for shape in (TOKENS, (24,)))
    targets = torch.randint(0, V, TOKENS)
    targets[0, 0] = -100
    return hidden, weight, targets


def both_losses(hidden, weight, targets, softcap=None, **options):
    """By way of the logits, and without."""
    logits = parallel_logits(hidden, weight, ALONE, 0, softcap=softcap)
    by_logits = parallel_cross_entropy(logits, targets, ALONE, None, **options)
    return by_logits, linear_cross_entropy(hidden, weight, targets, ALONE, None, softcap=softcap, **options)


def recorded(call, **options):
    with profile(activities=[ProfilerActivity.CPU], **options) as found:
        call()
    return found


def test_gradcheck():
    hidden, weight, targets = tensors()
    arguments = [each[..., :3].detach().clone().requires_grad_() for each in (hidden[:, :2], weight)]
    options = {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5}
    assert torch.autograd.gradcheck(lambda h, w: both_losses(h, w, targets[:, :2], **options), arguments)


def test_error_against_float64_is_that_of_pytorchs_cross_entropy():
    torch.manual_seed(0)
    h, w, y = torch.randn(300, 64), torch.randn(9000, 64) / 4, torch.randint(0, 9000, (300,))
    y[::7], options, found = -100, {"label_smoothing": 0.3}, []
    for loss, wide in (
        (lambda h, w: linear_cross_entropy(h, w, y, VocabPartition(9000, 1), None, **options), torch.float32),
        (lambda h, w: F.cross_entropy(F.linear(h, w), y, **options), torch.float32),
        (lambda h, w: F.cross_entropy(F.linear(h, w), y, **options), torch.float64),
    ):
        arguments = [each.to(wide).requires_grad_() for each in (h, w)]
        value = loss(*arguments)
        found.append([value.detach().double(), *(g.double() for g in torch.autograd.grad(value, arguments))])
    for ours, dense, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + 2.0**-24 * exact.abs().max()


def test_gradients_come_again_and_second_derivatives_are_refused():
    h, w, y = tensors()
    for loss in both_losses(h, w, y):
        first, second = (torch.autograd.grad(loss, (h, w), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (once,) = torch.autograd.grad(loss, h, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            once.sum().backward()


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    arguments = tensors()
    arguments[1 - wanted].requires_grad_(False)
    found = recorded(linear_cross_entropy(*arguments, ALONE, None).backward)
    products = {e.key: e.count for e in found.key_averages() if e.key in ("aten::mm", "aten::addmm_")}
    assert products == {"aten::mm": 7, "aten::addmm_": 7}, products  # 24 columns in blocks of 3, one of padding
    assert arguments[wanted].grad.shape == arguments[wanted].shape


def test_torch_func():
    h, w, y = tensors()
    found = torch.func.grad(lambda h: sum(both_losses(h, w.detach(), y)))(h.detach())
    torch.testing.assert_close(found, torch.autograd.grad(sum(both_losses(h, w, y)), h)[0])


@pytest.mark.slow
def test_compile():
    h, w, y = tensors(torch.float32)

    def losses(h, w):
        return sum(both_losses(h * 2, w, y, 3.0))

    expected, found = losses(h, w), torch.compile(losses, fullgraph=True, backend="aot_eager")(h, w)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(each, (h, w)) for each in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_refused():
    h, w, y = (each.detach() for each in tensors(torch.float32))
    x, ones = h @ w.T, torch.ones(TOKENS)
    assert_refused(
        (ValueError, "process_group must be given", lambda: linear_cross_entropy(h, w[:12], y, HALVES, None)),
        (TypeError, "process_group must be", lambda: linear_cross_entropy(h, w, y, ALONE, "tp")),
        (ValueError, "rank must be in", lambda: parallel_logits(h, w[:12], HALVES, 2)),
        (TypeError, "targets must be a torch.Tensor", lambda: linear_cross_entropy(h, w, [0], ALONE, None)),
        (TypeError, "logits must be float16, bfloat16 or float32", lambda: parallel_argmax(x.double(), ALONE, None)),
        (TypeError, "uniform must be", lambda: parallel_sample(x, ALONE, None, uniform=0.5)),
        (ValueError, r"uniform .* in \[0, 1\)", lambda: parallel_sample(x, ALONE, None, uniform=ones)),
    )


def collectives(vocab_size, seq_dim=None):
    """Those of each function, with the shapes of what they are given; of a loss forward, then backward."""
    partition, group = VocabPartition(vocab_size, dist.get_world_size()), dist.group.WORLD
    torch.manual_seed(0)
    h = torch.randn(8 if seq_dim is None else 2, E, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(partition.rows_per_rank, E, dtype=torch.bfloat16, requires_grad=True)
    x, y, losses = torch.randn(8, partition.rows_per_rank), torch.randint(0, vocab_size, (8,)), []
    calls = (
        lambda: losses.append(linear_cross_entropy(h, w, y, partition, group, seq_dim=seq_dim)),
        lambda: losses[0].backward(),
        lambda: parallel_top_k(x, 5, partition, group),
        lambda: parallel_argmax(x, partition, group),
        lambda: parallel_sample(x, partition, group, uniform=torch.full((8,), 0.5)),
    )
    found = [recorded(call, record_shapes=True).events() for call in calls]
    return [[(e.name, e.input_shapes) for e in events if e.name.startswith(("c10d::", "gloo:"))] for events in found]


def kinds(calls):
    names = [[name for name, _ in call if name.startswith("c10d::")] for call in calls]
    return [[re.search("reduce_scatter|allgather|allreduce", name)[0] for name in call] for call in names]


def test_collectives(world):
    """What is sent grows with tokens and k, never with the vocabulary."""
    for small, large in zip(*(world(4)(collectives, size) for size in (64, 4096)), strict=True):
        assert small == large
        assert kinds(small) == [["allgather"], ["allreduce"], ["allgather"], ["allgather"], ["allgather"] * 2]
    for split in world(4)(collectives, 64, 0):  # hidden states, statistics; hidden's gradient
        assert kinds(split)[:2] == [["allgather"] * 2, ["reduce_scatter"]]


def test_no_logits_in_memory():
    """What is allocated at once grows with a block, not with the vocabulary: at 8 times the columns, 1.1 times."""
    hidden, targets, peaks = torch.randn(256, 16), torch.randint(0, 4096, (256,)), []
    for vocab_size in (8192, 65536):
        weight = torch.randn(vocab_size, 16, requires_grad=True)
        held = peak = 0
        found = recorded(
            lambda: linear_cross_entropy(hidden, weight, targets, VocabPartition(vocab_size, 1), None).backward(),  # noqa: B023
            profile_memory=True,
        )
        for event in found.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak - weight.nbytes)
    assert peaks[0] < 256 * 8192 * 4 / 4
    assert peaks[1] < peaks[0] * 1.5
