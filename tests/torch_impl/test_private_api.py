"""Every private name that the package uses is there and does what it is used for."""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torch_impl
from torch_impl import private_api


def test_a_tensor_without_storage():
    class Piece(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    found = private_api.tensor_without_storage(Piece, torch.Size([7, 3]), torch.ones(2, dtype=torch.float16))
    assert (type(found), found.shape, found.dtype) == (Piece, (7, 3), torch.float16)


def test_gradient_listener_is_described():
    weight = nn.Parameter(torch.ones(2))
    assert private_api.gradient_listener(weight) is None
    handle = weight.register_hook(lambda grad: grad)
    assert "gradient hooks" in private_api.gradient_listener(weight)
    handle.remove()
    weight.register_post_accumulate_grad_hook(lambda parameter: None)
    assert "gradient hooks" in private_api.gradient_listener(weight)
    assert private_api.active_data_parallel() is None


def test_modules_are_told_when_they_move():
    class Told(private_api.ModuleThatMoves):
        told = 0

        def parameters_moved(self):
            self.told += 1

    module = Told()
    module.weight = nn.Parameter(torch.ones(2))
    nn.Sequential(module).double().to("cpu").to_empty(device="cpu")
    assert module.told == 3


def test_what_is_being_traced():
    def look(x):
        return x * (2 if private_api.being_traced() else 1) * (3 if private_api.function_is_inlined() else 1)

    one = torch.ones(2)
    assert torch.equal(look(one), one)
    assert torch.equal(make_fx(look)(one)(one), 2 * one)
    assert torch.equal(torch.compile(look, fullgraph=True, backend="eager")(one), 2 * one)
    mapped = torch.compile(lambda x: torch.func.vmap(look)(x), fullgraph=True, backend="eager")
    assert torch.equal(mapped(one), 6 * one)


def check_group():
    name = dist.group.WORLD.group_name
    return private_api.group_of_name(name) is dist.group.WORLD


def test_a_group_by_its_name(world):
    assert world(2)(check_group) == [True, True]


def test_they_are_in_one_file():
    private = re.compile(
        r"torch\._(?!_version__)|forward_ad|super\(torch\.autograd|ctypes|mincore|_make_wrapper_subclass|_resolve_process_group"
        r"|\._(?:apply|backward_hooks|indices|values|nnz|base|is_view|get_\w+)\b"
    )
    folder = Path(torch_impl.__file__).parent
    used = {path.name for path in folder.rglob("*.py") if private.search(path.read_text())}
    assert used == {"private_api.py"}
