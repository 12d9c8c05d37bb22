"""The ranks of a test's world of torch processes: each runs the functions that it is sent, until there are no more.

They are forked from one process, because importing torch takes seconds.
"""

import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist

import torch_impl  # noqa: F401


def load(path, loaded={}):  # noqa: B006
    if path not in loaded:
        spec = importlib.util.spec_from_file_location(f"of_rank_{len(loaded)}", path)
        loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[path])
    return loaded[path]


# What test modules import of this folder. The folder itself, on the path, would hide the packages of the same names.
for name in ("marks", "table_files"):
    sys.modules[name] = load(str(Path(__file__).with_name(f"{name}.py")))


def main():
    world_size = int(sys.argv[3])
    children = []
    for rank in range(world_size):
        child = os.fork()
        if not child:
            run_rank(*sys.argv[1:3], rank, world_size)
            return
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def run_rank(address, rendezvous, rank, world_size):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for category in (DeprecationWarning, FutureWarning):  # torch's use of what torch deprecates
        warnings.filterwarnings("ignore", category=category, module=r"torch\b")
    warnings.filterwarnings("ignore", ".*(torch.jit|should not be instantiated)", DeprecationWarning)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch 2.6
    with Client(address, "AF_UNIX") as pipe:
        pipe.send(rank)
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        while (task := pickle.loads(pipe.recv_bytes())) is not None:
            path, name, arguments = task
            try:
                result = None, getattr(load(path), name)(*arguments)
            except BaseException:
                result = traceback.format_exc(), None
            pipe.send_bytes(pickle.dumps(result))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
