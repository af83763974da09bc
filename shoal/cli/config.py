"""`shoal config`: the schema of the YAML files, and whether one of them is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from shoal.cli.command import Command, CommandGroup
from shoal.config.deploy_file import read_deploy_file
from shoal.config.knobs import KnobTable
from shoal.config.options import ModelOptions, ParallelOptions, RouterOptions, option
from shoal.config.router_settings import SettingsSource
from shoal.config.schema import file_schema
from shoal.config.sources import SERVE_SECTIONS
from shoal.config.yaml_entry import read_entries
from shoal.config.yaml_file import read_yaml
from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """A file to check."""

    file: str | None = option(None, "The YAML file.")
    kind: str = option(
        "auto",
        "Whose file it is; auto: told from its keys.",
        choices=("auto", "serve", "deploy", "router"),
    )


def _schema() -> int:
    print(json.dumps(file_schema(), indent=2))
    return 0


def _check(options: CheckOptions) -> int:
    if options.file is None:
        raise ConfigError("say which file: shoal config check FILE")
    kind = options.kind if options.kind != "auto" else _kind(options.file)
    if kind == "deploy":
        plan = read_deploy_file(options.file)
        said = f"{len(plan.models)} model(s): {', '.join(model.name for model in plan.models)}"
    elif kind == "router":
        settings = SettingsSource({}, {}, options.file).load()
        said = f"{len(settings.backends)} server(s)"
    else:
        said = _check_serve(options.file)
    print(f"{options.file}: right, for shoal {kind}; {said}")
    return 0


def _check_serve(file: str) -> str:
    errors: list[ConfigError] = []
    values = read_yaml(file, KnobTable(SERVE_SECTIONS), errors)
    if errors:
        raise ConfigError("\n".join(str(error) for error in errors))
    model, *_, parallel, _ = KnobTable(SERVE_SECTIONS).build(values)
    assert isinstance(model, ModelOptions) and isinstance(parallel, ParallelOptions)
    said = f"model {model.model}"
    if model.model != ModelOptions.model and not Path(model.model).exists():
        said += " (not on this machine)"
    if parallel.token_file is not None and not Path(parallel.token_file).expanduser().exists():
        said += f", token_file {parallel.token_file} (not on this machine)"
    return f"{said}, {len(parallel.nodes)} machines" if parallel.nodes else said


def _kind(file: str) -> str:
    names = read_entries(file).fields() if read_entries(file).value is not None else {}
    if "models" in names:
        return "deploy"
    router = {"backends", "backend", "keys", "aliases", "golden"} | set(KnobTable((RouterOptions,)).by_name)
    serve = {"communication"} | set(KnobTable(SERVE_SECTIONS).by_name)
    return "router" if any(name in router - serve for name in names) else "serve"


COMMAND = CommandGroup(
    name="config",
    description="The YAML files of shoal serve, shoal deploy and shoal router.",
    commands=(
        Command(
            name="config schema",
            description="Print the JSON Schema of the files, for editors and checks.",
            sections=(),
            run=_schema,
        ),
        Command(
            name="config check",
            description="Check a file; what is wrong is said with its line. Nothing is started.",
            sections=(CheckOptions,),
            positional="file",
            run=_check,
        ),
    ),
)
