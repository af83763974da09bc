"""The schema is one, takes what the readers take, and refuses what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from shoal.cli.config import COMMAND
from shoal.config.knobs import KnobTable
from shoal.config.schema import file_schema
from shoal.config.sources import SERVE_SECTIONS
from shoal.config.yaml_file import read_yaml
from shoal.errors import ConfigError

RIGHT = {
    "serve": "nodes: [{host: 10.0.0.1, port: 8000}, second:8001]\nmodel: {path: /m, type: large}\n"
    "communication: {protocol: tcp, timeout: 30}\nmax-model-len: 4096\nserved_model_name: one\n",
    "serve, plain": "model: shoal-tiny\nmax_num_seqs: 4\nkv-cache-memory: 1GiB\ndeterministic: true\n",
    "deploy": "models:\n  - {name: tiny, model: shoal-tiny, replicas: {min: 1, max: 2}, serve: {max_model_len: 64}}\n"
    "router: {port: 9000, policy: prefix-aware}\n",
    "router": "backends: [http://10.0.0.1:8000, {url: 'http://10.0.0.2:8000', weight: 2}]\nstall-timeout: 3\n",
}
WRONG = {
    "max-modle-len: 4": "line 1: max-modle-len is not an option; did you mean max-model-len",
    "model: m\nport: '8'": "line 2: port must be an integer",
    "nodes:\n- {host: a, prt: 1}": r"line 2: .*prt is not an option",
    "communication: {protocol: ib}": "line 1: communication.protocol must be one of auto, tcp, rdma",
    "models: []": "line 1: models names no model",
    "models: [{model: x, replicas: {min: 0}}]": "replicas.min must be an integer, 1 or more",
}


def check(path: Path) -> int:
    command, arguments = COMMAND.select(["check", str(path)])
    return command.main(arguments)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    schema = file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize("kind", RIGHT)
def test_right_files(schema: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.validate(yaml.safe_load(RIGHT[kind]), schema)
    (tmp_path / "file.yaml").write_text(RIGHT[kind])
    assert check(tmp_path / "file.yaml") == 0
    assert f"right, for shoal {kind.split(',')[0]};" in capsys.readouterr().out


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(schema: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema)
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match=WRONG[text]):
        check(tmp_path / "file.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nnodes:\n- {host: ''}", r"line 3: nodes\[0\] must have an address or a name as its host"),
        ("nodes:\n- {host: 'http://10.0.0.1'}", "line 2: .*found 'http://10.0.0.1'"),
        ("nodes: ['http://10.0.0.1:80']", "found 'http://10.0.0.1:80'"),
        ("nodes:\n- a\n- {host: 300.0.0.1}", r"line 3: nodes\[1\] .*found '300.0.0.1'"),
        ("nodes: ['a:0']", "a port from 1 to 65535; found 'a:0'"),
        ("nodes:\n- 10.0.0.1:80\n- {host: 10.0.0.1}", r"line 3: nodes\[1\] is 10.0.0.1, as nodes\[0\] in line 2 is"),
        ("nodes: ['[fd00::1]:80', 'fd00:0::1']", "a machine is named once"),
        ("nodes: [a, b]\nnnodes: 2", "line 2: nnodes says what nodes says"),
        ("nodes: [a, b]\nnode-rank: 1", "line 2: node_rank says what nodes says"),
        ("nodes: [a, b]\nmaster_addr: a", "line 2: master_addr says what nodes says"),
    ],
)
def test_machines_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "file.yaml")
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "file.yaml", KnobTable(SERVE_SECTIONS))


def test_all_errors_are_told_and_a_missing_token_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("model: m\nport: x\nnodes: ['']\nmax_modle_len: 1\n")
    with pytest.raises(ConfigError) as caught:
        check(file)
    assert sorted(line.split(": ")[0][-6:] for line in str(caught.value).splitlines()) == ["line 2", "line 3", "line 4"]
    file.write_text(
        "nodes: [10.0.0.1, 'node-2.example:8000', 'fd00::1']\ntoken_file: /nope\ndistributed_executor_backend: mp\n"
    )
    assert check(file) == 0
    assert "token_file /nope (not on this machine), 3 machines" in capsys.readouterr().out
