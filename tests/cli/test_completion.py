"""Shells complete `pve` by the script that it prints."""

import shutil
import subprocess
import sys

import pytest

# As bash calls it when the user presses the tabulator after the last word.
COMPLETE = """
source "$1"; shift
function=$(complete -p pve | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$function pve "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(pve, tmp_path):
    def write(shell):
        path = tmp_path / f"completion.{shell}"
        path.write_text(pve("completion", shell))
        return path

    return write


def test_bash_completes(script, tmp_path):
    (tmp_path / "tables").mkdir()
    for name in ("left.safetensors", "right.record"):
        (tmp_path / "tables" / name).touch()

    path = str(script("bash"))

    def completed(*words):
        command = ["bash", "--norc", "-c", COMPLETE, "_", path, "pve", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path / "tables")
        return set(done.stdout.split())

    assert {"compare", "diff", "plan", "record", "env", "completion"} <= completed("")
    assert completed("di") == {"diff"}
    assert {"--tensor", "--markdown", "--report", "--vocab-size"} <= completed("diff", "--")
    assert completed("compare", "--reduction", "a") == {"all_reduce", "all_to_all"}
    assert completed("diff", "le") == {"left.safetensors"}
    assert completed("compare", "--weights", "ri") == {"right.record"}
    assert completed("completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(script, shell):
    path = script(shell)
    assert "compare" in path.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_shtab_it_says_what_to_install(pve, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    pve.refused("pip install 'parallel-vocab-embedding[completion]'", "completion", "bash")
