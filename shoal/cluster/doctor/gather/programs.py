"""Runs the programs that know: short, with a deadline, and what went wrong as one line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from shoal import env


class ProgramError(Exception):
    """A program is missing, did not end in time or failed; the text says which."""


def run(command: Sequence[str], timeout: float) -> str:
    """Standard output. Raises ProgramError."""
    program = shutil.which(command[0])
    if program is None:
        raise ProgramError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=env.subprocess_environment({"LC_ALL": "C"}),
        )
    except subprocess.TimeoutExpired:
        raise ProgramError(f"{command[0]} did not end within {timeout:g} s") from None
    except OSError as error:
        raise ProgramError(f"{command[0]}: {error.strerror or error}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ProgramError(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout
