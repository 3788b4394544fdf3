"""The ``tta-sync`` command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from tta_sync.cli import commands, main


def test_commands_are_listed_when_help_is_asked_for(capsys):
    """--help names every command with what it does."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in commands.COMMANDS.items():
        assert f"{name} {summary}" in out


def test_version_is_the_distribution_s_when_asked_for(capsys):
    """--version is the installed distribution's."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tta-sync {version('tta-sync')}\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_command_explains_itself_when_help_is_asked_for(name, capsys):
    """Each command's --help says what it does and exits with 0."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tta-sync {name}")
    assert len(out.splitlines()) > 4


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["dev", "extra"], ["batch"]])
def test_usage_is_told_when_the_arguments_are_wrong(arguments, capsys):
    """Wrong arguments are exit status 2, with the usage."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: tta-sync" in capsys.readouterr().err


def test_ctrl_c_is_quiet_when_a_command_does_not_handle_it(monkeypatch):
    """A command that is interrupted exits with 130, without a traceback."""

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tta_sync.cli.batch.run", interrupted)
    assert main(["batch", "file"]) == 130


def test_command_line_imports_nothing_heavy_when_loaded():
    """`import tta_sync.cli` loads no integration library, and no command that was not asked for."""
    code = "import sys, tta_sync.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tta_sync.cli.commands" in loaded
    assert not {"flask", "redis", "rq", "rich", "sqlalchemy", "urllib.request", "tta_sync.cli.dev"} & set(loaded)


def test_module_is_the_command_when_run():
    """`python -m tta_sync.cli` is `tta-sync`."""
    result = subprocess.run([sys.executable, "-m", "tta_sync.cli", "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("tta-sync ")
