from __future__ import annotations

import json
import re
import sys

import pytest

from shoal.cli.collect_env import probe_torch
from shoal.cli.main import main


def test_the_report_as_lines_and_as_json(capsys, monkeypatch):
    monkeypatch.setenv("SHOAL_API_KEY", "hush")
    assert main(["collect-env"]) == 0
    lines = capsys.readouterr().out
    assert main(["collect-env", "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert set(report) == {"shoal", "cpu", "memory", "gpu", "torch", "packages", "environment"}
    for section, facts in report.items():
        assert f"{section}:\n" in lines
        assert all(isinstance(value, str) and value for value in facts.values())
    assert "hush" not in lines + text


@pytest.mark.parametrize(
    ("torch_source", "state"),
    [
        (None, "not installed"),
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "broken: .*libcudart.so.13"),
        ("import os; os.abort()", "broken: .*"),
    ],
)
def test_a_torch_that_does_not_work_is_told(tmp_path, torch_source, state):
    if torch_source is None:
        torch_source = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "torch.py").write_text(torch_source)
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    facts = probe_torch(str(launcher))
    assert list(facts) == ["state"]
    assert re.search(state, facts["state"])
