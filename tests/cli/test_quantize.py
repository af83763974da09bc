"""`shoal quantize` as it is typed."""

from __future__ import annotations

import json

import pytest

from shoal.cli.main import main
from shoal.config.model_path import embedded_model_path
from shoal.quantize.output import held_output


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["quantize", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_and_a_checkpoint(capsys, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    code, printed, err = run(capsys, "shoal-tiny", out, "--method", "int8", "--json", report)
    assert code == 0, err
    assert "relative error of weights" in printed and "mlp.down_proj" in printed and "MB became" in printed
    assert "layer 8/8 done" in err
    matrices = json.loads(report.read_text())["matrices"]
    assert len(matrices) == 8 * 7 and all(0 < matrix["error"] < 0.02 for matrix in matrices)
    code, _, err = run(capsys, "shoal-tiny", out, "--method", "int8")
    assert code == 2 and "holds a finished checkpoint; another directory would work, or --overwrite" in err
    code, _, err = run(capsys, out, tmp_path / "again", "--method", "int8")
    assert code == 1 and "is quantized already (by compressed-tensors)" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gtpq"], "did you mean gptq"),
        ([], "--method is needed: gptq, awq, fp8, int8"),
        (["--method", "gptq"], "--method gptq needs --calibration FILE"),
        (["--method", "awq", "--calibration", "/nowhere"], "--calibration /nowhere: there is no such file"),
        (["--method", "gptq", "--bits", "3", "--calibration", __file__], "--bits 3: gptq is written with 4 or 8"),
        (["--method", "fp8", "--bits", "4"], "--bits 4: fp8 is written with 8"),
        (["--method", "awq", "--bits", "8", "--calibration", __file__], "--bits 8: awq is written with 4"),
        (["--method", "int8", "--group-size", "64"], "--group-size does not go with --method int8"),
        (["--method", "gptq", "--group-size", "12", "--calibration", __file__], "positive multiple of 8; got 12"),
        (["--method", "gptq", "--sym", "--asym", "--calibration", __file__], "contradict each other"),
        (["--method", "awq", "--sym", "--calibration", __file__], "layout has zero points"),
        (["--method", "fp8", "--sym"], "--sym is an option of --method gptq alone"),
        (["--method", "int8", "--desc-act"], "--desc-act is an option of --method gptq alone"),
        (["--method", "int8", "--prune", "1:2"], "--prune 1:2: 2:4, or a share between 0 and 1"),
    ],
)
def test_wrong_usage_says_what_would_work(capsys, tmp_path, arguments, words):
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "out", *arguments)
    assert code == 2 and words in err
    assert not (tmp_path / "out").exists()


def test_sizes_that_the_group_does_not_divide(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text " * 200)
    options = ["--method", "gptq", "--calibration", text, "--group-size", "96"]
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "out", *options)
    assert code == 2 and "q_proj has 256 inputs, which --group-size 96 does not divide" in err
    # Nothing was done: the right options need no --overwrite.
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "out", *options[:-1], "36")
    assert code == 2 and "positive multiple of 8" in err
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "out", *options[:-1], "48")
    assert code == 2 and "--group-size 48 does not divide" in err


def test_layers_that_stay_as_they_are(capsys, tmp_path):
    options = ["--method", "int8", "--ignore", "layers.0"]
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "out", *options)
    assert code == 0 and "layer 1/8 done: stays as it is" in err and "layer 2/8 done: error" in err, err
    code, _, err = run(capsys, "shoal-tiny", tmp_path / "typo", *options, "donw_proj")
    assert code == 2 and "--ignore donw_proj: no matrix of the layers has this name" in err
    assert "self_attn.q_proj" in err and "model.layers.0 for a whole layer" in err


def test_directories_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for name, words in (("file", "is a file"), ("used", "holds files that no unfinished run left")):
        code, _, err = run(capsys, "shoal-tiny", tmp_path / name, "--method", "int8")
        assert code == 2 and words in err
    code, _, err = run(capsys, "shoal-tiny", embedded_model_path(), "--method", "int8", "--overwrite")
    assert code == 2 and "is MODEL itself" in err


def test_a_directory_has_one_run_at_a_time(capsys, tmp_path):
    out = tmp_path / "out"
    with held_output(out):
        code, _, err = run(capsys, "shoal-tiny", out, "--method", "int8")
        assert code == 2 and "is being written by another run" in err and "wait for it, or end it" in err
    assert not out.exists(), "nothing was written"


def test_the_first_qwen_is_refused_by_name(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    config = {"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, tmp_path / "model", tmp_path / "out", "--method", "int8")
    assert code == 1 and "the first Qwen (QWenLMHeadModel) cannot be quantized" in err
