"""`shoal verify PATH`: SHA-256 sums of a directory, against a list and across all nodes.

Sums go to standard output as `sha256sum -c` takes them, all else to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shoal import network
from shoal.checksum import SumCache, escape_name, format_sum, hash_files, list_files, parse_sums
from shoal.cli.client_options import ClusterOptions
from shoal.cli.command import Command
from shoal.cli.verify_options import VerifyOptions
from shoal.cluster.verify.comparison import (
    MISSING,
    Difference,
    FileSums,
    compare_nodes,
    compare_with_list,
    relative_to,
)
from shoal.cluster.verify.nodes import NodeHashing, find_nodes
from shoal.cluster.verify.service import HashAnswer, find_root
from shoal.errors import ConfigError, ShoalError

_REFRESHES_PER_SECOND = 5


def _run(options: VerifyOptions, cluster: ClusterOptions) -> int:
    if options.path is None:
        raise ConfigError("of what? shoal verify PATH: a directory, a file, or the name of a downloaded model")
    listed = _read_list(options.check) if options.check is not None else None
    return _verify_nodes(options, cluster, listed) if options.cluster else _verify_here(options, listed)


# --- this machine ----------------------------------------------------------------------------------------------------


def _verify_here(options: VerifyOptions, listed: Mapping[str, str] | None) -> int:
    assert options.path is not None
    root = find_root(options.path)
    if listed is not None:
        listed = relative_to(root, listed, is_file=root.is_file())
    listing = list_files(root, also=listed or ())
    if options.check is not None:
        # The list itself often lies beside what it lists.
        for name in [name for name, path in listing.files.items() if _is_same(path, options.check)]:
            del listing.files[name]
    with _bars() as bar:
        advance = bar(str(root))
        found = hash_files(
            listing,
            num_jobs=options.jobs,
            cache=SumCache(root) if options.cache else None,
            begin=lambda num_bytes: advance(0, num_bytes),
            advance=lambda num_bytes: advance(num_bytes, None),
        )
    sums = FileSums(found.sums, found.unreadable)
    if listed is None:
        if not found.sums and not found.unreadable:
            _say(f"shoal verify: there are no files in {root}")
            return 1
        _print_sums(found.sums)
        for name, reason in found.unreadable.items():
            _say(f"{_shown(name)}: {reason}")
        if found.unreadable:
            _say(f"shoal verify: {_count(len(found.unreadable), 'file')} could not be read")
        return 1 if found.unreadable else 0
    verdicts = compare_with_list(sums, listed)
    for verdict in verdicts:
        _say(f"{_shown(verdict.name)}: {f'FAILED ({verdict.trouble})' if verdict.trouble else 'OK'}")
    failed = Counter(_kind(sums, listed, verdict.name) for verdict in verdicts if verdict.trouble)
    num_failed = failed.total()
    if num_failed:
        kinds = ", ".join(f"{number} {kind}" for kind, number in failed.items())
        _say(f"shoal verify: {num_failed} of {_count(len(verdicts), 'file')} FAILED: {kinds}")
        return 1
    _say(f"shoal verify: {_count(len(verdicts), 'file')} OK")
    return 0


def _kind(found: FileSums, listed: Mapping[str, str], name: str) -> str:
    if name in found.unreadable:
        return "unreadable"
    if name not in listed:
        return "not in the list"
    return "with another sum" if name in found.sums else MISSING


# --- all nodes -------------------------------------------------------------------------------------------------------


def _verify_nodes(options: VerifyOptions, cluster: ClusterOptions, listed: Mapping[str, str] | None) -> int:
    assert options.path is not None
    token = network.load_token(cluster.token_file)
    nodes = find_nodes(cluster.address, token)
    path = os.path.abspath(options.path) if Path(options.path).exists() else options.path
    if listed is not None:
        listed = relative_to(Path(path), listed, is_file=Path(path).is_file())
    hashing = NodeHashing(
        nodes.endpoints, token, path, num_jobs=options.jobs, use_cache=options.cache, also=listed or ()
    )
    with _bars() as bar:
        bars = {node: bar(node) for node in nodes.endpoints}
        shown = dict.fromkeys(nodes.endpoints, 0)

        def show(answers: Mapping[str, HashAnswer]) -> None:
            for node, answer in answers.items():
                bars[node](answer.num_read - shown[node], answer.num_bytes)
                shown[node] = answer.num_read

        found = hashing.run(show)
    if options.check is not None:
        found = {node: _without_list(sums, path, options.check, listed) for node, sums in found.items()}
    differences = compare_nodes(found, listed)
    differing = {difference.name for difference in differences}
    if found and listed is None:
        some = next(iter(found.values()))
        _print_sums({name: digest for name, digest in some.sums.items() if name not in differing})
    absent = {**nodes.absent, **hashing.errors}
    _report_nodes(differences, absent, found, listed)
    has_files = any(sums.sums or sums.unreadable for sums in found.values()) or bool(listed)
    return 1 if differences or absent or not has_files else 0


def _without_list(found: FileSums, path: str, check: str, listed: Mapping[str, str] | None) -> FileSums:
    """The list itself, if it lies in the directory, is on nodes what it is here: no file of the model."""
    name = os.path.relpath(os.path.realpath(check), os.path.realpath(path))
    if name in (listed or ()):
        return found
    return FileSums({each: digest for each, digest in found.sums.items() if each != name}, found.unreadable)


def _report_nodes(
    differences: list[Difference],
    absent: Mapping[str, str],
    found: Mapping[str, FileSums],
    listed: Mapping[str, str] | None,
) -> None:
    for node, reason in absent.items():
        _say(f"{node}: {reason}")
    source = "the list's" if listed is not None else "of most nodes"
    width = max((len(state) for each in differences for state, _ in each.groups), default=0)
    for difference in differences:
        _say(_shown(difference.name))
        for state, nodes in difference.groups:
            mark = f"  ({source})" if state == difference.expected else ""
            _say(f"  {state.ljust(min(width, 64))}  {', '.join(nodes)}{mark}")
        if listed is not None and difference.expected not in [state for state, _ in difference.groups]:
            _say(f"  {str(difference.expected).ljust(min(width, 64))}  ({source})")
    num_files = len({name for sums in found.values() for name in (*sums.sums, *sums.unreadable)} | set(listed or ()))
    num_nodes = len(found) + len(absent)
    if not num_files and found:
        _say(f"shoal verify: there are no files on {_count(len(found), 'node')}")
        return
    if not differences and not absent:
        _say(f"shoal verify: {_count(num_files, 'file')} are the same on {_count(num_nodes, 'node')}")
        return
    to_look_at = sorted({node for each in differences for node in each.nodes} | set(absent))
    _say(
        f"shoal verify: {len(differences)} of {_count(num_files, 'file')} differ; "
        f"look at {', '.join(to_look_at)} (of {_count(num_nodes, 'node')})"
    )


# --- in and out ------------------------------------------------------------------------------------------------------


def _read_list(source: str) -> dict[str, str]:
    if source == "-":
        return parse_sums(os.fsdecode(sys.stdin.buffer.read()), "standard input")
    try:
        return parse_sums(os.fsdecode(Path(source).read_bytes()), source)
    except OSError as error:
        raise ConfigError(f"cannot read the list of sums {source}: {error.strerror or error}") from error


def _is_same(path: Path, other: str) -> bool:
    with contextlib.suppress(OSError):
        return other != "-" and path.samefile(other)
    return False


def _print_sums(sums: Mapping[str, str]) -> None:
    """As bytes: a name need not be text. Raises ShoalError where they cannot be written."""
    out = sys.stdout.buffer
    try:
        for name, digest in sums.items():
            out.write(os.fsencode(format_sum(name, digest)) + b"\n")
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What the buffer still holds would be written once more at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise ShoalError(f"cannot write the sums: {error.strerror or error}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(name: str) -> str:
    """On one line, and printable whatever the name is."""
    return escape_name(name)[0].encode(errors="backslashreplace").decode()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int | None], None]]]:
    """Makes a bar for a title; that is told of more bytes done, or of how many there are.

    Nothing is drawn where standard error is no terminal.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=_REFRESHES_PER_SECOND,
    )

    def add(title: str) -> Callable[[int, int | None], None]:
        task: TaskID = progress.add_task(title, total=None)
        return lambda done, total: progress.update(task, advance=done, total=total)

    with progress:
        yield add


COMMAND = Command(
    name="verify",
    description="Print the SHA-256 sums of a model's files as `sha256sum -c` takes them, or compare them with a list "
    "(--check) or between all nodes (--cluster). Exit code 1 when something differs, is missing or cannot be read.",
    sections=(VerifyOptions, ClusterOptions),
    positional="path",
    run=_run,
)
