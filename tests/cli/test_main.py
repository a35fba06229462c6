"""The command line's manners: what it loads, how it fails, which exit code it leaves."""

import subprocess
import sys
import time

import click
import pytest

from gqa import __version__
from gqa.cli import main as cli
from gqa.errors import GqaError

HEAVY = ("torch", "numpy", "transformers", "numba", "altair", "huggingface_hub", "rich")


ENTRY = "from gqa.cli.main import main; main()"  # what the installed `gqa` script does


def run(*arguments):
    """(exit code, stdout, stderr) of a real process."""
    done = subprocess.run([sys.executable, "-c", ENTRY, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def leave(capsys, *arguments):
    """(exit code, stdout, stderr) in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["plan", "llama-3-70b", "--device", "H100 SXM", "--kv-heads", "1"], ["plan", "--help"]],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from gqa.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_importing_gqa_loads_nothing_heavy():
    code = f"import sys, gqa; print([name for name in {HEAVY!r} if name in sys.modules], gqa.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"[] {__version__}\n"


def test_help_begins_with_examples(capsys):
    code, out, err = leave(capsys, "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Examples:"
    assert all(line.startswith("  gqa ") for line in lines[1:4])
    assert all(name in out for name in cli.COMMANDS)


def test_no_command_shows_the_help(capsys):
    _, out, err = leave(capsys)
    assert "Examples:" in out + err


def test_version(capsys):
    assert leave(capsys, "--version") == (0, f"gqa {__version__}\n", "")


def test_an_unknown_command(capsys):
    code, out, err = leave(capsys, "pln")
    assert (code, out) == (2, "")
    assert err.startswith("error: No such command 'pln'.")
    assert err.endswith("hint: gqa --help\n")


def test_an_unknown_option(capsys):
    code, out, err = leave(capsys, "plan", "llama-3-8b", "--colour")
    assert (code, out) == (2, "")
    assert err.endswith("hint: gqa plan --help\n")


def test_errors_of_a_real_process():
    code, out, err = run("plan", "llama-3-70b", "--kv-heads", "12")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: 12 KV heads do not divide 64 query heads",
        "allowed: 1, 2, 4, 8, 16, 32, 64",
        "hint: the same command with --kv-heads 8",
    ]


def command_that(monkeypatch, action):
    @click.command()
    def command():
        return action()

    monkeypatch.setattr(cli._Group, "get_command", lambda *_: command)


def test_a_users_mistake_leaves_2(capsys, monkeypatch):
    def fail():
        raise GqaError("wrong", hint="right")

    command_that(monkeypatch, fail)
    assert leave(capsys, "plan") == (2, "", "error: wrong\nhint: right\n")


def test_a_no_leaves_1(capsys, monkeypatch):
    command_that(monkeypatch, lambda: click.get_current_context().exit(1))
    assert leave(capsys, "plan") == (1, "", "")


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    command_that(monkeypatch, interrupted)
    code, out, err = leave(capsys, "plan")
    assert (code, out) == (130, "")
    assert err.strip() == "interrupted; to go on: gqa plan"


def test_a_bug_is_not_hidden(monkeypatch):
    def broken():
        raise ZeroDivisionError

    command_that(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


def test_a_reader_that_goes_away():
    command = f"{sys.executable} -c '{ENTRY}' plan llama-3-70b --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_help_is_quick():
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        run("--help")
        best = min(best, time.perf_counter() - start)
    assert best < 1.0  # 0.1 s on a quiet machine; the bound here only catches a heavy import
