"""`shoal verify` on this machine, as a user runs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.cli.main import main


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/b\\ack"):
        (root / name).write_text(name)
    return root


def lines_of(capsysbinary: pytest.CaptureFixture[bytes]) -> tuple[bytes, list[str]]:
    out, err = capsysbinary.readouterr()
    return out, err.decode().splitlines()


def test_sums_that_sha256sum_takes(model: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["verify", str(model)]) == 0
    out, err = lines_of(capsysbinary)
    assert [line[-12:] for line in out.splitlines()] == [b" config.json", b".safetensors", b"  sub/b\\\\ack"]
    assert err == []  # no terminal, no bar
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "-"], cwd=model, input=out, check=True)


def test_a_list_that_fits_and_one_that_does_not(model: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    main(["verify", str(model)])
    sums = model / "SHA256SUMS"
    sums.write_bytes(lines_of(capsysbinary)[0])
    assert main(["verify", str(model), "--check", str(sums)]) == 0
    out, err = lines_of(capsysbinary)
    assert out == b"" and err == [
        "config.json: OK", "model.safetensors: OK", "sub/b\\\\ack: OK", "shoal verify: 3 files OK"
    ]  # fmt: skip
    (model / "model.safetensors").write_text("model.safetensorz")
    (model / "config.json").unlink()
    (model / "extra").write_text("x")
    (model / "broken").symlink_to("nowhere")
    assert main(["verify", str(model), "--check", str(sums)]) == 1
    err = lines_of(capsysbinary)[1]
    assert err[0] == "config.json: FAILED (missing)"
    assert err[1].startswith("model.safetensors: FAILED (the sum is ")
    assert err[2] == "sub/b\\\\ack: OK"
    assert err[3].startswith("broken: FAILED (unreadable: a link to nowhere")
    assert err[4] == "extra: FAILED (not in the list)"
    assert err[5] == (
        "shoal verify: 4 of 5 files FAILED: 1 missing, 1 with another sum, 1 unreadable, 1 not in the list"
    )


def test_a_byte_that_flips_between_two_runs_is_found(model: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    main(["verify", str(model)])
    before = lines_of(capsysbinary)[0]
    time.sleep(0.02)
    with (model / "model.safetensors").open("r+b") as file:
        file.write(b"M")
    main(["verify", str(model)])
    after = lines_of(capsysbinary)[0]
    assert [old == new for old, new in zip(before.splitlines(), after.splitlines(), strict=True)] == [True, False, True]


def test_a_directory_without_files(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["verify", str(tmp_path), "--no-cache"]) == 1
    assert lines_of(capsysbinary) == (b"", [f"shoal verify: there are no files in {tmp_path}"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_sums_that_cannot_be_written(model: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", "verify", str(model)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "shoal: error: cannot write the sums: No space left on device\n")


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may read everything")
def test_what_may_not_be_read_is_named(model: Path) -> None:
    (model / "model.safetensors").chmod(0)
    (model / "sub").chmod(0)
    command = [sys.executable, "-m", "shoal.cli", "verify", str(model), "--no-cache"]
    if os.geteuid() == 0:  # without the right to read everything
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (model / "sub").chmod(0o755)
    assert done.returncode == 1, done
    assert done.stderr.splitlines() == [
        "sub: Permission denied",
        "model.safetensors: Permission denied",
        "shoal verify: 2 files could not be read",
    ], done
    assert done.stdout.endswith("  config.json\n")


def test_one_file_and_a_model_of_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["verify", str(model / "config.json")]) == 0
    (line,) = lines_of(capsysbinary)[0].splitlines()
    assert line.endswith(b"  config.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    blob = tmp_path / "models--org--name" / "blobs" / "abc"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "rev"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text("config.json")
    (snapshot / "config.json").symlink_to(blob)
    assert main(["verify", "org/name"]) == 0
    assert lines_of(capsysbinary)[0].splitlines() == [line]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "of what? shoal verify PATH"),
        (["{model}x"], 1, "does not exist"),
        (["{model}", "--check", "/no/such"], 2, "cannot read the list of sums /no/such: No such file"),
        (["{model}", "--check", "{model}/config.json"], 2, "config.json, line 1: no sum"),
        (["{model}", "--jobs", "0"], 2, "--jobs must be an integer, 1 or more"),
    ],
)
def test_errors_say_what_would_work(
    model: Path, capsysbinary: pytest.CaptureFixture[bytes], arguments: list[str], code: int, message: str
) -> None:
    assert main(["verify", *(argument.format(model=model) for argument in arguments)]) == code
    assert message in lines_of(capsysbinary)[1][-1]


def test_ctrl_c_ends_it_at_once(model: Path) -> None:
    with (model / "huge").open("wb") as file:
        file.truncate(1 << 40)
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.cli", "verify", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        # Until it reads: the file is open, and the threads are there.
        deadline = time.monotonic() + 60
        while str(model / "huge") not in _open_files(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 10
        assert process.stdout is not None and process.stdout.read() == b""
    finally:
        process.kill()
        process.communicate()


def _open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(link))
    return found
