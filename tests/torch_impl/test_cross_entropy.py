"""Logits and cross entropy over a split vocabulary: against the float64 oracle, PyTorch's own, and over gloo ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch_layers import DTYPES, array_of, assert_refused, tensor_of

from shared import VocabPartition
from shared.head import LossOptions
from shared.proof import head_oracle
from torch_impl import linear_cross_entropy, parallel_cross_entropy, parallel_logits

V, E, TOKENS = 21, 8, (3, 8)  # padded to 24, of 4 ranks the last has 3 ids; padded to 28 it has none
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.02, "ignore_index": 4, "invalid_targets": "ignore"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5},
]


def case(dtype=torch.float64, world_size=1, padding=np.nan, padded=24):
    """Hidden states, a table whose padding rows hold anything, targets of which some are ignored, and the partition."""
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, padded)
    hidden = rng.standard_normal((*TOKENS, E)).astype(DTYPES[dtype])
    weight = rng.standard_normal((padded, E)).astype(DTYPES[dtype])
    weight[V:] = padding
    targets = rng.integers(0, V, TOKENS)
    targets[0, :3], targets[2, 5], targets[1, :2] = -100, 4, (0, V - 1)
    return hidden, weight, targets, partition


def tensors(*arguments, **options):
    """The tensors of a case, and its partition."""
    hidden, weight, targets, partition = case(*arguments, **options)
    return tensor_of(hidden), tensor_of(weight), torch.from_numpy(targets), partition


def group_and_rank(partition):
    return (None, 0) if partition.world_size == 1 else (dist.group.WORLD, dist.get_rank())


def own_rows(weight, partition, rank):
    return tensor_of(weight[partition.start(rank) : partition.stop(rank)]).requires_grad_()


def upstream_of(reduction, shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape) if reduction == "none" else np.array(0.7)


def part_of(hidden, seq_dim, rank, world_size):
    return hidden if seq_dim is None else np.split(hidden, world_size, axis=seq_dim)[rank]


def check_against_the_oracle(options, dtype, seq_dim=None, padded=24, by_logits=False):
    """Loss, what else is returned, and every gradient, with cotangents for each output."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)
    hidden, weight, targets, partition = case(dtype, world_size, padded=padded)
    known, own = LossOptions(**options), slice(partition.start(rank), partition.stop(rank))
    grads = [upstream_of(known.reduction, TOKENS)]
    if not by_logits:  # which returns nothing else
        grads += [upstream_of("none", TOKENS, seed) for seed in (2, 3)]
    expected = head_oracle.loss(hidden, weight, targets, V, known, *grads)
    given = tensor_of(part_of(hidden, seq_dim, rank, world_size)).requires_grad_()
    rows, targets, returns = own_rows(weight, partition, rank), torch.from_numpy(targets), ("lse", "logprobs", "count")
    wide = 1e-12 if dtype == torch.float64 else 2e-6
    if by_logits:
        others = {name: value for name, value in options.items() if name != "softcap"}
        logits = parallel_logits(given, rows, partition, rank, softcap=known.softcap)
        of_oracle = head_oracle.logits(hidden, weight, V, known.softcap)[..., own]
        np.testing.assert_allclose(logits.detach(), of_oracle, rtol=wide, atol=wide)
        found = [parallel_cross_entropy(logits, targets, partition, group, **others)]
    else:
        found = linear_cross_entropy(
            given, rows, targets, partition, group, seq_dim=seq_dim, returns=returns, **options
        )
        assert found[3] == expected.count
    for value, reference in zip(found, (expected.loss, expected.lse, expected.logprobs), strict=False):
        np.testing.assert_allclose(value.detach(), reference, rtol=wide, atol=10 * wide)
    torch.autograd.backward(found[: len(grads)], [torch.from_numpy(each).to(found[0].dtype) for each in grads])
    assert given.grad.dtype == rows.grad.dtype == dtype
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0  # once, to the dtype of the inputs
    np.testing.assert_allclose(rows.grad.double(), expected.weight_grad[own], rtol=rounding, atol=20 * wide)
    assert not rows.grad[max(0, V - own.start) :].any()
    hidden_grad = given.grad.double()
    if by_logits and group:  # each rank has its part of a sum, rounded
        dist.all_reduce(hidden_grad)
    atol = 20 * wide + 4 * rounding * by_logits
    reference = part_of(expected.hidden_grad, seq_dim, rank, world_size)
    np.testing.assert_allclose(hidden_grad, reference, rtol=rounding, atol=atol)
    return array_of(found[0]).tobytes()


def check_every_option():
    kinds = (torch.float64, None, 24), (torch.float32, 1, 28), (torch.bfloat16, 1, 24), (torch.bfloat16, None, 24)
    losses = [check_against_the_oracle(options, *kind) for options in OPTIONS for kind in kinds]
    for options in OPTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            losses.append(check_against_the_oracle(options, dtype, by_logits=True))
    return losses


@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_one_rank_is_the_oracle(options, dtype, by_logits):
    check_against_the_oracle(options, dtype, by_logits=by_logits)


def test_every_rank_has_the_oracles_loss_and_the_same_bits(world):
    ranks = world(4)(check_every_option)
    assert all(losses == ranks[0] for losses in ranks)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_gradcheck(options):
    hidden, weight, targets, partition = tensors(padding=1.0)
    hidden, weight = (each[..., :3].contiguous().requires_grad_() for each in (hidden[:, :2], weight))
    targets = targets[:, :2]

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, partition, None, returns=("lse", "logprobs"), **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    softcap = options.get("softcap")
    assert torch.autograd.gradcheck(
        lambda hidden, weight: parallel_logits(hidden, weight, partition, 0, softcap=softcap)[..., :V], (hidden, weight)
    )
    others = {name: value for name, value in options.items() if name != "softcap"}
    logits = torch.randn(3, 2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: parallel_cross_entropy(x, targets, partition, None, **others), (logits,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_is_pytorchs_cross_entropy(reduction, smoothing):
    logits, targets = torch.randn(50, 30, dtype=torch.float64), torch.randint(0, 30, (50,))
    targets[::7] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    results = []
    for loss in (
        lambda x: parallel_cross_entropy(x, targets, VocabPartition(30, 1), None, **options),
        lambda x: F.cross_entropy(x, targets, **options),
    ):
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward(torch.linspace(-1, 1, 50).double() if reduction == "none" else None)
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(*results)


def both(hidden, weight, targets, partition, **options):
    """The loss and gradients of hidden states and rows, by ``linear_cross_entropy`` and by way of the logits."""
    for linear in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if linear:
            loss = linear_cross_entropy(h, w, targets, partition, None, **options)
        else:
            loss = parallel_cross_entropy(parallel_logits(h, w, partition, 0), targets, partition, None, **options)
        loss.sum().backward()
        yield loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
def test_ignored_targets_have_no_loss_and_no_gradient(reduction, poison):
    hidden, weight, targets, partition = tensors()
    ignored = targets == -100
    expected = list(both(hidden[~ignored], weight, targets[~ignored], partition, reduction=reduction, z_loss=0.1))
    hidden[ignored] = poison
    found = both(hidden, weight, targets, partition, reduction=reduction, z_loss=0.1)
    for (loss, hidden_grad, weight_grad), reference in zip(found, expected, strict=True):
        if reduction == "none":
            assert (loss[ignored] == 0).all()
            loss = loss[~ignored]
        torch.testing.assert_close(loss, reference[0])
        assert (hidden_grad[ignored] == 0).all()
        torch.testing.assert_close(hidden_grad[~ignored], reference[1])
        torch.testing.assert_close(weight_grad, reference[2])


def test_all_ignored_gives_zero_and_no_gradient():
    hidden, weight, _, partition = tensors()
    targets = torch.full(TOKENS, -100)
    for results in both(hidden, weight, targets, partition):
        assert not any(each.any() for each in results)
    count = linear_cross_entropy(hidden, weight, targets, partition, None, returns=("count",))[1]
    assert (count.dtype, int(count)) == (torch.int64, 0)


def test_special_logits():
    partition, inf, nan = VocabPartition(3, 1), torch.inf, torch.nan
    logits = torch.tensor([[0.0, -inf, 1], [0, -inf, 1], [-inf] * 3, [0, nan, 1], [0, inf, 1]], requires_grad=True)
    targets = torch.tensor([0, 1, 0, 0, 1])
    loss = parallel_cross_entropy(logits, targets, partition, None, reduction="none")
    np.testing.assert_allclose(loss.detach(), [1.3132616, inf, nan, nan, nan], rtol=1e-6)
    expected = F.cross_entropy(logits.detach(), targets, reduction="none")
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    loss[:2].sum().backward()
    assert torch.equal(logits.grad[2:], torch.zeros(3, 3))  # no upstream gradient
    torch.testing.assert_close(logits.grad[0], torch.tensor([-0.7310586, 0, 0.7310586]))
    smoothed = parallel_cross_entropy(logits.detach()[:1], targets[:1], partition, None, label_smoothing=0.1)
    assert smoothed == inf


def test_inputs_are_kept_and_second_derivatives_refused():
    h, w, y, partition = tensors()
    h.requires_grad_(), w.requires_grad_()
    before = [each.detach().clone() for each in (h, w, y)]
    logits = parallel_logits(h, w, partition, 0)
    kept = logits.detach().clone()
    losses = linear_cross_entropy(h, w, y, partition, None), parallel_cross_entropy(logits, y, partition, None)
    for loss in losses:
        first, second = (torch.autograd.grad(loss, (h, w), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (once,) = torch.autograd.grad(loss, h, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            once.sum().backward()
    for given, copy in zip((h, w, y, logits), (*before, kept), strict=True):
        np.testing.assert_array_equal(given.detach(), copy)


def test_only_the_gradients_that_are_wanted_are_computed():
    for wanted in ("hidden", "weight"):
        hidden, weight, targets, partition = tensors()
        given = {"hidden": hidden, "weight": weight}
        given[wanted].requires_grad_()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            linear_cross_entropy(**given, targets=targets, partition=partition, process_group=None).backward()
        products = {e.key: e.count for e in recorded.key_averages() if e.key in ("aten::mm", "aten::addmm_")}
        assert products == {"aten::mm": 2 * 7, "aten::addmm_": 7}, products  # 24 columns in blocks of 3, one of padding
        assert given[wanted].grad.shape == given[wanted].shape


def test_torch_func():
    h, w, y, partition = tensors()

    def loss(hidden):
        return linear_cross_entropy(hidden, w, y, partition, None) + parallel_cross_entropy(
            parallel_logits(hidden, w, partition, 0), y, partition, None
        )

    found = torch.func.grad(loss)(h)
    torch.testing.assert_close(found, torch.autograd.grad(loss(h.requires_grad_()), h)[0])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_targets_of_any_integer_dtype(dtype):
    h, w, y, partition = tensors()
    losses = [linear_cross_entropy(h, w, each, partition, None) for each in (y.clamp(0), y.clamp(0).to(dtype))]
    assert torch.equal(*losses)


def check_bad_targets():
    """Out of the vocabulary, or in the padding: an IndexError on every rank, or no loss."""
    hidden, weight, targets, partition = case(world_size=4)
    group, rank = group_and_rank(partition)
    h, w = tensor_of(hidden), own_rows(weight, partition, rank)
    logits = parallel_logits(h, w, partition, rank)
    for bad in (V, 23, -1, 2**40):
        given = torch.from_numpy(targets)
        given[1, 4] = bad
        for loss, arguments in ((linear_cross_entropy, (h, w)), (parallel_cross_entropy, (logits,))):
            with pytest.raises(IndexError, match=rf"targets\[1, 4\] = {bad} is outside the vocabulary \[0, 21\)"):
                loss(*arguments, given, partition, group)
            left_out = loss(*arguments, given, partition, group, invalid_targets="ignore", reduction="none")
            assert left_out[1, 4] == 0
            with_it = given.clone()
            with_it[1, 4] = -100
            assert torch.equal(left_out, loss(*arguments, with_it, partition, group, reduction="none"))


def check_empty_batch():
    partition, w = VocabPartition(5, 4, 8), torch.randn(2, E, requires_grad=True)
    for shape, seq_dim in (((0, E), None), ((3, 0, E), 1)):
        h, targets = torch.empty(shape, requires_grad=True), torch.empty(shape[:-1], dtype=torch.int64)
        loss = linear_cross_entropy(h, w, targets, partition, dist.group.WORLD, seq_dim=seq_dim)
        loss.backward()
        assert (loss, h.grad.shape, w.grad.any()) == (0, h.shape, False)


@pytest.mark.parametrize("check", [check_bad_targets, check_empty_batch])
def test_bad_targets_and_empty_batches(world, check):
    world(4)(check)


def test_what_is_refused():
    (h, w, y, partition), halves = tensors(torch.float32), VocabPartition(V, 2, 24)
    assert_refused(
        (ValueError, "own 12 columns, got 24", lambda: parallel_cross_entropy(h @ w.T, y, halves, None)),
        (ValueError, "process_group must be given", lambda: linear_cross_entropy(h, w[:12], y, halves, None)),
        (ValueError, r"rank's own rows, \[12, emb_size\]", lambda: parallel_logits(h, w, halves, 0)),
        (ValueError, "emb_size=8 as weight has", lambda: parallel_logits(h[..., 1:], w, partition, 0)),
        (ValueError, "one a token, of shape", lambda: linear_cross_entropy(h, w, y[0], partition, None)),
        (ValueError, "seq_dim must name", lambda: linear_cross_entropy(h, w, y, partition, None, seq_dim=2)),
        (ValueError, "rank must be in", lambda: parallel_logits(h, w[:12], halves, 2)),
        (TypeError, "hidden must be of the weight's dtype", lambda: parallel_logits(h.double(), w, partition, 0)),
        (TypeError, "hidden must be float16", lambda: parallel_logits(h.int(), w, partition, 0)),
        (TypeError, "targets must be a tensor", lambda: linear_cross_entropy(h, w, y.float(), partition, None)),
        (TypeError, "process_group must be", lambda: linear_cross_entropy(h, w, y, partition, "tp")),
    )


def collectives_of(seq_dim):
    """Those of a forward, and those of its backward."""
    hidden, weight, targets, partition = case(torch.bfloat16, 4)
    h = tensor_of(part_of(hidden, seq_dim, dist.get_rank(), 4)).requires_grad_()
    w, y, calls = own_rows(weight, partition, dist.get_rank()), torch.from_numpy(targets), []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss = linear_cross_entropy(h, w, y, partition, dist.group.WORLD, seq_dim=seq_dim)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        loss.backward()
    for recorded in (forward, backward):
        calls.append([e.name for e in recorded.events() if e.name.startswith("c10d::")])
    return calls


@pytest.mark.parametrize("seq_dim", [None, 1])
def test_collectives(world, seq_dim):
    """Forward: one all-gather; backward: one reduction, of float32; with a split sequence two more, of its own."""
    for forward, backward in world(4)(collectives_of, seq_dim):
        assert len(forward) == 1 + (seq_dim is not None), forward
        assert all("gather" in name for name in forward)
        assert len(backward) == 1
        assert ("reduce_scatter" if seq_dim is not None else "allreduce") in backward[0]


BIT_CASES = [
    (sizes, dtype)
    for sizes in ((8, 5, 7), (1000, 33, 130), (6288, 64, 1100))  # vocab_size, emb_size and tokens
    for dtype in (torch.float32, torch.bfloat16)
]


def bits_of(sizes, dtype):
    """The bytes of the loss, of logsumexp and of this rank's part of the table's gradient."""
    torch.manual_seed(0)
    vocab_size, emb_size, tokens = sizes
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    partition = VocabPartition(vocab_size, world_size)
    group, rank = group_and_rank(partition)
    hidden, table = torch.randn(tokens, emb_size).to(dtype), torch.randn(vocab_size, emb_size).to(dtype) / 8
    rows = table[partition.start(rank) : partition.stop(rank)].clone().requires_grad_()
    targets = torch.randint(0, vocab_size, (tokens,))
    loss, lse = linear_cross_entropy(
        hidden, rows, targets, partition, group, label_smoothing=0.1, z_loss=0.01, returns=("lse",)
    )
    loss.backward()
    logits = parallel_logits(hidden, rows, partition, rank)
    from_logits = parallel_cross_entropy(logits, targets, partition, group)
    everywhere = [each.detach().numpy().tobytes() for each in (loss, lse, from_logits)]
    return everywhere, [each.detach().float().numpy().tobytes() for each in (rows.grad, logits.T.contiguous())]


def bits_of_every_case():
    return [bits_of(*case) for case in BIT_CASES]


def test_the_same_bits_for_any_number_of_ranks(world):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks have
    try:
        alone = bits_of_every_case()
    finally:
        torch.set_num_threads(threads)
    for world_size in (2, 4):
        ranks = world(world_size)(bits_of_every_case)
        for number, (everywhere, whole) in enumerate(alone):
            note = world_size, *BIT_CASES[number]
            assert all(rank[number][0] == everywhere for rank in ranks), note
            parts = zip(*(rank[number][1] for rank in ranks), strict=True)
            assert [b"".join(each) for each in parts] == whole, note


def test_no_logits_in_memory():
    """What is allocated at once grows with a block, not with the vocabulary: at 8 times the columns, 1.1 times."""
    hidden, targets, peaks = torch.randn(256, 16), torch.randint(0, 4096, (256,)), []
    for vocab_size in (8192, 65536):
        weight = torch.randn(vocab_size, 16, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            linear_cross_entropy(hidden, weight, targets, VocabPartition(vocab_size, 1), None).backward()
        held = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak - weight.nbytes)
    assert peaks[0] < 256 * 8192 * 4 / 4
    assert peaks[1] < peaks[0] * 1.5


@pytest.mark.slow
def test_compile():
    h, w, y, partition = tensors(torch.float32)
    h.requires_grad_(), w.requires_grad_()

    def losses(h, w):
        logits = parallel_logits(h * 2, w, partition, 0, softcap=3.0)
        return parallel_cross_entropy(logits, y, partition, None) + linear_cross_entropy(h * 2, w, y, partition, None)

    expected = losses(h, w)
    found = torch.compile(losses, fullgraph=True)(h, w)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(each, (h, w)) for each in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_error_against_float64_is_that_of_a_dense_computation():
    torch.manual_seed(0)
    h, w, y = torch.randn(300, 64), torch.randn(9000, 64) / 4, torch.randint(0, 9000, (300,))
    found = []
    for loss, wide in (
        (lambda h, w: linear_cross_entropy(h, w, y, VocabPartition(9000, 1), None), torch.float32),
        (lambda h, w: F.cross_entropy(F.linear(h, w), y), torch.float32),
        (lambda h, w: F.cross_entropy(F.linear(h, w), y), torch.float64),
    ):
        arguments = [each.to(wide).requires_grad_() for each in (h, w)]
        value = loss(*arguments)
        found.append([value.detach().double(), *(g.double() for g in torch.autograd.grad(value, arguments))])
    for ours, dense, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + 2.0**-24 * exact.abs().max()
