"""Several processes, for real: two with two devices each, one mesh over all four."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


def start(port, folder):
    script = Path(__file__).with_name("one_of_two_processes.py")
    commands = [[sys.executable, str(script), str(process), str(port), str(folder)] for process in range(2)]
    return [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_two_devices(tmp_path):
    for attempt in range(3):
        with socket.socket() as probe:  # JAX takes a port, not a file: another program may take it before JAX does
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / str(attempt)).mkdir()
        processes = start(port, tmp_path / str(attempt))
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        if attempt < 2 and any("address already in use" in output.lower() for output in outputs):
            continue
        break
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "all equal" in output
