"""The command `shoal doctor` on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shoal.cli.main import main


def test_json_and_exit_codes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path))
    code = main(["doctor", "--quick", "--json", "shoal-tiny"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ok"] else 1)
    checks = {finding["check"] for finding in report["findings"]}
    assert {"shoal", "shared memory", "limits", "address", "free ports", "model path", "shards", "memory"} <= checks
    assert report["facts"]["layout"]["state"] == "fits"
    # A model that is nowhere fails, whatever else is well.
    assert main(["doctor", "--quick", str(tmp_path / "none")]) == 1
    assert "FAIL  model path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--skip", "torch,lnks"], "--skip takes"),
        (["--cluster"], "--address HEAD:PORT"),
        (["--adress", "x"], "address"),
    ],
)
def test_wrong_usage(arguments, word, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["doctor", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_head_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", "a-token-for-tests-only")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", "--quick", "--json", "--address", "127.0.0.1:1500"]) == 1
    failed = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["status"] == "fail"]
    assert {"answers", "open ports"} <= {each["check"] for each in failed}
    assert any("1501/tcp (daemon)" in each["seen"] and "refused" in each["seen"] for each in failed)


def test_it_works_without_torch_and_ray():
    """Both cannot be imported, as where they are not installed."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'ray', 'transformers', 'numpy', 'safetensors'):\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'ray', 'transformers', 'triton', 'safetensors'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from shoal.cli.main import main\n"
        "sys.exit(main(['doctor', '--quick', '--json', 'shoal-tiny']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    skipped = {each["check"] for each in report["findings"] if each["status"] == "skip"}
    assert {"torch", "ray"} <= skipped, done.stderr
