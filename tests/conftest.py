"""What tests of several rooms need."""

import contextlib
import doctest
import importlib
import inspect
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import types
from multiprocessing.connection import Connection, Listener, Pipe
from pathlib import Path

import numpy as np
import pytest
from environment import WITHOUT, left_out, reason_to_skip

collect_ignore = left_out()


def pytest_report_header() -> str | None:
    return f"without {', '.join(sorted(WITHOUT))}: leaves out {', '.join(collect_ignore)}" if WITHOUT else None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            # One worker runs them all, so that each world of processes is started once.
            item.add_marker(pytest.mark.multiprocess)
            item.add_marker(pytest.mark.xdist_group("world"))
        if "compile" in item.name or "torch.compile" in inspect.getsource(item.function):
            item.add_marker(pytest.mark.compile)
        if reason := reason_to_skip(item.nodeid):
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def pve(capsys):
    """``pve(*arguments)``: a command of ``pve``, as its user meets it."""
    from command import Pve

    return Pve(capsys)


def modules_of(package: str) -> list[types.ModuleType]:
    """A package and all its modules, those that run on import left out."""
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, package + ".")
    return [root, *(importlib.import_module(each.name) for each in found)]


@pytest.fixture
def check_documentation():
    """Run a package's examples, and hold every module to its ``__all__``."""

    def check(package: str, with_examples: set[str]) -> None:
        attempted = set()
        for module in modules_of(package):
            runner = doctest.DocTestRunner(verbose=False)
            for test in doctest.DocTestFinder().find(module, globs={}):
                failures, tried = runner.run(test)
                assert failures == 0, f"the example of {test.name} fails"
                if tried:
                    attempted.add(test.name)
            assert isinstance(module.__all__, list), module.__name__
            for name in module.__all__:
                assert hasattr(module, name), f"{module.__name__}.__all__ names {name}, which is not there"
            public = {
                name
                for name, value in vars(module).items()
                if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
            }
            undocumented = {name for name in public & set(module.__all__) if not vars(module)[name].__doc__}
            assert not undocumented, f"{module.__name__}: no docstring for {undocumented}"
        assert with_examples <= attempted, f"no example run for {with_examples - attempted}"

    return check


class World:
    """Torch processes in one gloo group, which run functions of test modules: ``world(function, *arguments)``."""

    def __init__(self, server: Connection, world_size: int, folder: Path) -> None:
        with Listener(str(folder / "socket"), "AF_UNIX") as listener:
            server.send((world_size, str(folder / "socket"), str(folder / "rendezvous")))
            pipes = [listener.accept() for _ in range(world_size)]
        ranks = sorted((*pipe.recv(), pipe) for pipe in pipes)
        self.process_ids = [process_id for _rank, process_id, _pipe in ranks]
        self.pipes = [pipe for *_, pipe in ranks]
        self.broken = False

    def __call__(self, function, *arguments):
        """What each rank's call returned; an AssertionError with their tracebacks if any failed."""
        results = self._run(function, *arguments)
        failures = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(results) if error]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def errors(self, function, *arguments):
        """The traceback of each rank's call, or None."""
        return [error for error, _ in self._run(function, *arguments)]

    def _run(self, function, *arguments):
        self.broken = True  # until all have answered
        task = pickle.dumps((inspect.getfile(function), function.__name__, arguments))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        results = [self._result(pipe) for pipe in self.pipes]
        self.broken = any(error for error, _ in results)
        return results

    @staticmethod
    def _result(pipe):
        try:
            return pickle.loads(pipe.recv_bytes()) if pipe.poll(180) else ("no answer within three minutes", None)
        except (EOFError, ConnectionResetError):
            return "the process has ended", None

    def end(self):
        """Kill the ranks: to end their groups takes seconds."""
        for pipe, process_id in zip(self.pipes, self.process_ids, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
            pipe.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """``world(w)``: a ``World`` of w ranks, kept for the next test that asks for one."""
    worlds: dict[int, World] = {}
    server, its_end = Pipe()
    command = [sys.executable, "-P", str(Path(__file__).with_name("rank.py")), str(its_end.fileno())]
    process = subprocess.Popen(command, start_new_session=True, pass_fds=[its_end.fileno()])
    its_end.close()
    server.recv()  # an EOFError if it has ended: its own error is on standard error

    def of_size(world_size):
        if world_size not in worlds or worlds[world_size].broken:
            if world_size in worlds:
                worlds.pop(world_size).end()
            worlds[world_size] = World(server, world_size, tmp_path_factory.mktemp("world"))
        return worlds[world_size]

    yield of_size
    process.kill()
    process.wait()
    for each in worlds.values():
        each.end()
