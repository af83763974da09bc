"""What a command of the `shoal` program is: its options, its bare argument and the function that runs it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from shoal.config.flags import help_text
from shoal.config.knobs import KnobTable
from shoal.config.sources import options_from_arguments
from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Command:
    """One command. `run` takes one instance of each of `sections`, in that order, and returns the exit code.

    positional: the option that a bare argument sets. takes_config: `--config FILE` is offered.
    """

    name: str
    description: str
    sections: tuple[type, ...]
    run: Callable[..., int]
    positional: str | None = None
    takes_config: bool = False

    @property
    def commands(self) -> tuple[Command, ...]:
        """What can be typed under this name: this command alone."""
        return (self,)

    def select(self, arguments: Sequence[str]) -> tuple[Command, list[str]]:
        """This command and its arguments: it has no subcommands."""
        return self, list(arguments)

    def main(self, arguments: Sequence[str]) -> int:
        """Parse and run. Raises ShoalError; `shoal.cli.main` turns it into a line and an exit code."""
        return self.run(*self.parse(arguments))

    def parse(self, arguments: Sequence[str]) -> list[Any]:
        return options_from_arguments(arguments, self.sections, self.positional, takes_config=self.takes_config)

    def usage(self) -> str:
        positional = f" [{self.positional.upper()}]" if self.positional else ""
        config = " [--config FILE]" if self.takes_config else ""
        options = " [options]" if self.sections else ""
        return f"usage: shoal {self.name}{positional}{config}{options}"

    def help(self) -> str:
        parts = [self.usage(), "", textwrap.fill(self.description, 100)]
        if self.takes_config:
            parts += [
                "",
                "  --config FILE\n        A YAML file with the same names; what the command line says counts more.",
            ]
        return "\n".join(parts) + "\n" + help_text(KnobTable(self.sections))


@dataclasses.dataclass(frozen=True)
class CommandGroup:
    """Commands under one name (`shoal node start`, `shoal node stop`); theirs begin with it."""

    name: str
    description: str
    commands: tuple[Command, ...]

    def select(self, arguments: Sequence[str]) -> tuple[Command | CommandGroup, list[str]]:
        """The subcommand that the first argument names, and its arguments; the group itself when help is asked for.

        Raises ConfigError.
        """
        first, *rest = arguments or [""]
        for command in self.commands:
            if command.name == f"{self.name} {first}":
                return command, rest
        if first in ("-h", "--help"):
            return self, [first]
        names = " or ".join(f"shoal {command.name}" for command in self.commands)
        raise ConfigError(f"{first!r} is not a command of shoal {self.name}; there is {names}")

    def main(self, arguments: Sequence[str]) -> int:
        """The bare name of a group is no command: `select` has refused it, or asked for help."""
        raise AssertionError(f"{self.name} is a group")

    def help(self) -> str:
        parts = [f"usage: shoal {self.name} COMMAND [options]", "", textwrap.fill(self.description, 100)]
        for command in self.commands:
            parts += ["", command.help()]
        return "\n".join(parts)
