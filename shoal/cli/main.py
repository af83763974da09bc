"""The `shoal` command: finds the subcommand, loads its module, and turns our errors into one line and an exit code.

Exit codes: 0 done, 1 an error, 2 wrong usage or configuration, 130 Ctrl-C; for `serve` and `router` Ctrl-C is the end
in order: 0.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from shoal import env, log
from shoal.cli.command import Command, CommandGroup
from shoal.cli.first_signals import ends_at_once
from shoal.errors import ConfigError, ShoalError
from shoal.version import __version__

# Command -> (module with a COMMAND, summary). Modules load when they are used: `shoal version` needs none of them.
COMMANDS = {
    "serve": ("shoal.cli.serve", "serve a model behind the OpenAI API"),
    "router": ("shoal.cli.router", "one entrance to several servers: router, router status, router drain"),
    "chat": ("shoal.cli.chat", "talk to a server in the terminal"),
    "complete": ("shoal.cli.complete", "let a server continue one prompt"),
    "demo": ("shoal.cli.demo", "serve the embedded model, ask it a question, and go on serving"),
    "bench": ("shoal.cli.bench", "measure an engine or a server: bench serve, latency, throughput, startup"),
    "node": ("shoal.cli.node", "make this machine a node of a cluster: node start, node stop"),
    "deploy": ("shoal.cli.deploy", "keep replicas of models on a cluster: deploy CONFIG, deploy status, deploy stop"),
    "config": ("shoal.cli.config", "the YAML files: config schema, config check FILE"),
    "plan": ("shoal.cli.plan", "what a model takes, every layout that fits a machine, and the one to take"),
    "verify": ("shoal.cli.verify", "SHA-256 sums of a model's files, against a list and across all nodes"),
    "doctor": ("shoal.cli.doctor", "look for what keeps a machine, or a cluster, from serving, and say what mends it"),
    "quantize": ("shoal.cli.quantize", "make a quantized checkpoint of a plain one: gptq, awq, fp8, int8"),
    "k8s": ("shoal.cli.k8s", "manifests for Kubernetes: k8s render"),
    "status": ("shoal.cli.status", "show the nodes of the cluster"),
    "collect-env": ("shoal.cli.collect_env", "print versions, CPU, memory, GPUs: what a bug report needs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with ends_at_once() if given[:1] in (["serve"], ["router"]) else contextlib.nullcontext():
            return _dispatch(given)
    except ShoalError as error:
        return _report(error, given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `shoal … | head`: nobody reads on. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def load_command(name: str) -> Command | CommandGroup:
    """Raises ConfigError for an unknown name, with the nearest right one."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, "version", "help"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*COMMANDS, 'version'])}"
        raise ConfigError(f"{name!r} is not a command; {hint}")
    command: Command | CommandGroup = importlib.import_module(COMMANDS[name][0]).COMMAND
    return command


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if arguments[1:]:
            print(load_command(arguments[1]).help())
        else:
            print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("version", "--version", "-V"):
        if rest:
            raise ConfigError(f"version takes no arguments; got {rest[0]!r}")
        print(__version__)
        return 0
    command, rest = load_command(name).select(rest)
    options = rest[: rest.index("--")] if "--" in rest else rest
    if "--help" in options or "-h" in options:
        print(command.help())
        return 0
    log.configure()
    return command.main(rest)


def _overview() -> str:
    lines = ["usage: shoal COMMAND [options]", "", "Serve a large language model behind the OpenAI API.", ""]
    lines += [f"  {name:<13} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [f"  {'version':<13} print the version", "", "shoal COMMAND --help shows a command's options."]
    return "\n".join(lines)


def _report(error: ShoalError, arguments: Sequence[str]) -> int:
    if _debugging(arguments):
        import traceback

        traceback.print_exception(error)
    color = sys.stderr.isatty() and not env.no_color()
    label = "\033[31mshoal: error:\033[0m" if color else "shoal: error:"
    print(f"{label} {error}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _debugging(arguments: Sequence[str]) -> bool:
    pairs = zip(arguments, arguments[1:], strict=False)
    if "--log-level=debug" in arguments or ("--log-level", "debug") in pairs:
        return True
    try:
        return env.log_level() == "debug"
    except ConfigError:
        return False


if __name__ == "__main__":
    sys.exit(main())
