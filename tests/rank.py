"""The ranks of the tests' worlds of torch processes: each runs the functions that it is sent, until it is killed.

All are forked from one process, because importing torch takes seconds.
"""

import importlib.util
import os
import pickle
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import torch_impl  # noqa: F401


def load(path, loaded={}):  # noqa: B006
    if path not in loaded:
        spec = importlib.util.spec_from_file_location(f"of_rank_{len(loaded)}", path)
        loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[path])
    return loaded[path]


# What test modules import of this folder. The folder itself, on the path, would hide the packages of the same names.
for name in ("marks", "table_files", "torch_layers"):
    sys.modules[name] = load(str(Path(__file__).with_name(f"{name}.py")))


def main():
    """Fork the ranks of each world that is asked for, until this process is killed."""
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2))  # imports what ranks would import
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that end leave nothing behind
    with Connection(int(sys.argv[1])) as pipe:
        pipe.send("ready")
        while True:
            world_size, *ends = pipe.recv()
            for rank in range(world_size):
                if not os.fork():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    run_rank(*ends, rank, world_size)


def run_rank(address, rendezvous, rank, world_size):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for category in (DeprecationWarning, FutureWarning):  # torch's use of what torch deprecates
        warnings.filterwarnings("ignore", category=category, module=r"torch\b")
    warnings.filterwarnings("ignore", ".*(torch.jit|should not be instantiated)", DeprecationWarning)
    for message in ("TypedStorage is deprecated", "DTensor random operators may not"):  # torch 2.6
        warnings.filterwarnings("ignore", message, UserWarning)
    with Client(address, "AF_UNIX") as pipe:
        pipe.send((rank, os.getpid()))
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        while True:
            path, name, arguments = pickle.loads(pipe.recv_bytes())
            try:
                function = getattr(load(path), name)
                result = None, getattr(function, "on_rank", function)(*arguments)
            except BaseException:
                result = traceback.format_exc(), None
            pipe.send_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
