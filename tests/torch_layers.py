"""What tests of the PyTorch layers share, in pytest's process and on the ranks of a world."""

import contextlib
import functools
import inspect
import re
import warnings

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_impl import ParallelVocabEmbedding

DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}
MODES = [("all_reduce", "dense"), ("all_reduce", "routed"), ("reduce_scatter", "dense"), ("reduce_scatter", "routed")]


def on_ranks(world_size):
    """Make a function a test that runs on each rank of a world, with the test's fixtures and parameters."""

    def decorate(function):
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def test(world, **arguments):
            named = inspect.unwrap(function)  # by its file and name a rank finds the test
            world(world_size)(named, *(arguments[name] for name in parameters))

        of_world = inspect.Parameter("world", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([of_world, *parameters.values()])
        test.on_rank = function
        return test

    return decorate


def tensor_of(array):
    """A tensor of an array's bits, in memory of its own."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def equal_bits(a, b):
    return (a.shape, a.dtype) == (b.shape, b.dtype) and array_of(a).tobytes() == array_of(b).tobytes()


def ranks_of(vocab_size, emb_size, world_size, **options):
    """The layers of all ranks."""
    return [ParallelVocabEmbedding(vocab_size, emb_size, r, world_size, **options) for r in range(world_size)]


def set_rows(emb, table):
    """Copy the rank's rows of a whole table, an array."""
    start, stop = emb.partition.owned_range(emb.rank)
    with torch.no_grad():
        emb.weight[: stop - start] = tensor_of(table[start:stop])
    return emb


def whole_table(layers):
    """The table whose parts these layers hold, without padding."""
    rows = [layer.partition.owned_range(layer.rank) for layer in layers]
    return torch.cat([layer.weight.detach()[: stop - start] for layer, (start, stop) in zip(layers, rows, strict=True)])


@functools.cache  # making groups takes longer than most tests
def mesh_of(*sizes):
    """A mesh of the world's ranks, whose last dimension is called tp."""
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def over(place, mesh):
    """The options of a layer over a mesh: its weight is a DTensor, or with a process group padded."""
    if place == "device_mesh":
        return {"device_mesh": mesh}
    return {"process_group": mesh.get_group(), "padded_vocab_size": "even"}


def whole(tensor):
    """The tensor, or all of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def function_of(emb):
    """The layer as a function of a table and ids."""
    return lambda weight, ids: torch.func.functional_call(emb, {"weight": weight}, (ids,))


def assert_compiled_is_the_same(emb, ids, **how):
    """A layer compiled to one graph gives the output and the gradient of eager mode, bit for bit."""
    results = []
    for call in (emb, torch.compile(emb, fullgraph=True, **how)):
        emb.zero_grad()
        output = call(ids)
        output.square().sum().backward()
        results.append((output, whole(emb.weight.grad)))
    for eager, compiled in zip(*results, strict=True):
        assert equal_bits(compiled, eager)


def looked_up(table, ids, start):
    """By stock operations the rows of a rank's table, whose first id is ``start``, and zeros for other ids."""
    owned = (ids >= start) & (ids < start + len(table))
    return torch.where(owned.unsqueeze(-1), table[torch.where(owned, ids - start, 0)], 0)


def allocated(function, *arguments):
    """Bytes that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function(*arguments)
    return sum(max(0, event.self_cpu_memory_usage) for event in recorded.key_averages())


def rows_of(emb, held, table):
    """The rows of a layer's tensor, without padding, and those of a whole table that they stand for."""
    start, stop = (0, emb.vocab_size) if emb.device_mesh else emb.partition.owned_range(emb.rank)
    return whole(held)[: stop - start], table[start:stop]


class Model(nn.Module):
    """A lookup and a layer: the least that has parameters on both sides of a wrapper."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.out = nn.Linear(emb.embedding_dim, 3, dtype=emb.weight.dtype)

    def forward(self, ids):
        return self.out(self.emb(ids)).square()


def whole_model(table):
    """The model with an unsharded embedding."""
    return Model(nn.Embedding.from_pretrained(table, freeze=False))


@contextlib.contextmanager
def without_warnings():
    """Ignore what a library warns of by its own doing; also a decorator."""
    with warnings.catch_warnings(action="ignore"):
        yield


@contextlib.contextmanager
def named(*case):
    """Say in the traceback of a failure which case it is of."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {case}")
        raise


def assert_refused(*cases):
    """Each case is an error's class, a part of its message, and a call that raises it."""
    for kind, message, call in cases:
        found = "nothing was raised"
        try:
            call()
        except kind as error:
            found = str(error)
        assert re.search(message, found), f"{message!r} is not in: {found}"
