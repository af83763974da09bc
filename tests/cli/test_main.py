from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from shoal.cli.first_signals import ends_at_once
from shoal.cli.main import COMMANDS, load_command, main
from shoal.version import __version__
from tests.config.model_directory import write_model_directory


@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["-V"]])
def test_version(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert main(["help", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: shoal {name}")
    assert load_command(name).description.split(".")[0] in out.replace("\n", " ")


def test_overview_names_all_commands(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in [*COMMANDS, "version"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["srve"], 2, "'srve' is not a command; did you mean serve?"),
        (["version", "x"], 2, "version takes no arguments"),
        (["serve", "--max-modle-len", "1"], 2, "did you mean --max-model-len?"),
        (["serve", "/no/such/model"], 1, "the model directory /no/such/model does not exist"),
        (["chat", "--port", "1"], 2, "--port is not an option"),
        (["chat", "--config", "x"], 2, "--config is not an option"),
        (["complete", "--url", "nowhere", "x"], 2, "must begin with http://"),
        (["node"], 2, "'' is not a command of shoal node; there is shoal node start or shoal node stop"),
        (["node", "begin"], 2, "'begin' is not a command of shoal node"),
        (["node", "stop", "--all"], 2, "--all is not an option"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(arguments, code, message, capsys):
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("shoal: error: ") and message in error
    assert error.count("\n") == 1


def test_debugging_shows_where(tmp_path, monkeypatch, capsys):
    arguments = ["serve", str(write_model_directory(tmp_path)), "--max-model-len", "99999"]
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*arguments, "--log-level", "debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "debug")
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_variable_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "loud")
    assert main(["chat"]) == 2
    assert "SHOAL_LOG_LEVEL" in capsys.readouterr().err


def test_light_commands_load_nothing_heavy():
    script = (
        "import sys; from shoal.cli.main import main; main(['version']); main(['chat', '--help']);"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'pydantic', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_is_no_crash():
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from shoal.cli.main import main; sys.exit(main(['help']*1))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["shoal.cli.main.load_command", "shoal.cli.serve.resolve"])
def test_serve_ends_in_order_from_the_first_moment_on(number, when):
    module, name = when.rsplit(".", 1)
    script = (
        f"import os, sys, {module} as module; from shoal.cli.main import main\n"
        f"module.{name} = lambda *given, **named: os.kill(os.getpid(), {int(number)})\n"
        "sys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "stopped while starting\n")


def test_what_nohup_ignores_stays_ignored_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_at_once():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGHUP, found)
