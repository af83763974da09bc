"""`shoal doctor [MODEL]`: looks for what keeps a machine, or a cluster, from serving, and says what mends it."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import msgspec

from shoal import env
from shoal.cli.client_options import ClusterOptions
from shoal.cli.command import Command
from shoal.cli.doctor_options import DoctorOptions
from shoal.cluster.doctor.examination import examine
from shoal.cluster.doctor.facts import ClusterFacts
from shoal.cluster.doctor.findings import has_failed
from shoal.cluster.doctor.layout import plan_layout
from shoal.cluster.doctor.links_file import write_links
from shoal.cluster.doctor.render import as_json, as_text
from shoal.cluster.doctor.run import Question, look
from shoal.cluster.doctor.survey import Steps
from shoal.errors import ConfigError
from shoal.log import get_logger

logger = get_logger(__name__)


def _run(options: DoctorOptions, cluster: ClusterOptions) -> int:
    facts = look(
        Question(
            model=options.model,
            address=cluster.address,
            is_wide=options.cluster,
            steps=_steps(options),
            token_file=cluster.token_file,
            port=options.head_port,
            say=_say,
        )
    )
    own = facts.nodes[0].model
    if own is not None and own.path:
        layout = plan_layout(own.path, facts.nodes, options.gpu_memory_utilization)
        facts = msgspec.structs.replace(facts, layout=layout)
    findings = examine(
        facts,
        has_peers=options.cluster or cluster.address is not None or len(facts.nodes) > 1,
        utilization=options.gpu_memory_utilization,
        num_threads=env.omp_num_threads(),
    )
    if options.json:
        print(as_json(findings, facts))
    else:
        color = sys.stdout.isatty() and not env.no_color()
        width = shutil.get_terminal_size((120, 24)).columns
        print(as_text(findings, color=color, width=width))
    _keep_links(facts)
    return 1 if has_failed(findings) else 0


def _steps(options: DoctorOptions) -> Steps:
    names = [field.name for field in dataclasses.fields(Steps)]
    skipped = {name.strip() for each in options.skip for name in each.split(",")}
    if unknown := sorted(skipped - set(names)):
        raise ConfigError(f"--skip takes {', '.join(names)}; got {', '.join(unknown)}")
    return Steps(**{name: not (options.quick or name in skipped) for name in names})


def _keep_links(facts: ClusterFacts) -> None:
    try:
        path = write_links(facts.links)
    except OSError as error:
        logger.warning("what was measured of links is not kept for `shoal plan`: %s", error)
        return
    if path is not None:
        _say(f"the links' figures are in {path}, for `shoal plan`")


def _say(line: str) -> None:
    """To standard error: what is found goes to standard output."""
    print(f"shoal doctor: {line}", file=sys.stderr, flush=True)


COMMAND = Command(
    name="doctor",
    description="Look for what keeps this machine from serving a model, or with --cluster or --address all machines of "
    "a cluster from working together: each finding with what was seen and what mends it. --address also looks from a "
    "machine that is to join. Exit code 1 when something fails.",
    sections=(DoctorOptions, ClusterOptions),
    positional="model",
    run=_run,
)
