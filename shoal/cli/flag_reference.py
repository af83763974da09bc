"""The flag reference as Markdown: `python -m shoal.cli.flag_reference > docs/flags.md` (a test keeps it current)."""

from __future__ import annotations

from shoal.cli.main import COMMANDS, load_command
from shoal.config.flags import describe, flag_usage, section_title
from shoal.config.knobs import KnobTable

_HEAD = """\
# Flags

Made by `python -m shoal.cli.flag_reference > docs/flags.md` from the option classes; do not edit it by hand.

Each option has one name everywhere. `max_model_len`, for example, is

| where | how it is written |
|---|---|
| command line | `--max-model-len 4096` (`--max_model_len` too) |
| YAML file (`--config FILE`) | `max-model-len: 4096` or `max_model_len: 4096` |
| environment | `SHOAL_MAX_MODEL_LEN=4096` |
| Python | `LLM(max_model_len=4096)` (the options of model, cache and scheduler) |

Where several say something, the first of these wins: command line or keyword, file, environment, default. Switches
are turned off by `--no-…`. A flag with `…` takes several values, or one JSON list; give MODEL before such a flag.
Unknown names, wrong types and values out of range are refused with the nearest name or the values that would work.
"""


def markdown() -> str:
    """The whole document."""
    parts = [_HEAD]
    for command in (command for name in COMMANDS for command in load_command(name).commands):
        name = command.name
        parts.append(f"## shoal {name}\n\n{command.description}\n\n    {command.usage().removeprefix('usage: ')}\n")
        table = KnobTable(command.sections)
        for section in table.sections:
            parts.append(f"### {name}: {section_title(section)}\n\n| flag | meaning |\n|---|---|")
            knobs = [knob for knob in table.knobs if knob.section is section]
            parts[-1] += "".join(f"\n| {_code(flag_usage(knob))} | {_cell(describe(knob))} |" for knob in knobs) + "\n"
    return "\n".join(parts)


def _code(usage: str) -> str:
    return ", ".join(f"`{spelling}`" for spelling in usage.split(", "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
