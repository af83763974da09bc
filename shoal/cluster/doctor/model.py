"""Checks of a model: it is there, whole, the same on all machines, and there is memory for it."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor.facts import LayoutFacts, ModelFacts, ModelFile, NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.config.sizes import format_size

GROUP = "model"
_MOST_NAMED = 4
_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")


def check(node: NodeFacts) -> list[Finding]:
    """One machine's copy."""
    report, facts = Reporter(GROUP, node.name), node.model
    if facts is None:
        return []
    if facts.error or not facts.path:
        report.fail("model path", facts.error or f"there is no {facts.name} here", f"copy {facts.name} to {node.name}")
        return report.findings
    fetch = f"copy it again: `rsync -a OTHER:{facts.path}/ {facts.path}/`, or `hf download`"
    if trouble := _config_trouble(facts):
        report.fail("model path", f"{facts.path}: {trouble}", fetch)
    else:
        report.ok("model path", f"{facts.path}, {format_size(facts.weight_bytes)} of weights")
    if not any(file.name in _TOKENIZERS or file.name.endswith(".tiktoken") for file in facts.files):
        report.warn("tokenizer", f"{facts.path} has no tokenizer (none of {', '.join(_TOKENIZERS)})", fetch)
    if facts.missing:
        report.fail("shards", f"{_names(facts.missing)}: named in the index of {facts.path}, and missing there", fetch)
    broken = [file for file in facts.files if file.name in facts.weights and _what_is_wrong(file)]
    for file in broken[:_MOST_NAMED]:
        report.fail("shards", f"{file.name} in {facts.path}: {_what_is_wrong(file)}", fetch)
    if len(broken) > _MOST_NAMED:
        report.fail("shards", f"and {_names([file.name for file in broken[_MOST_NAMED:]])}", fetch)
    if facts.strays:
        report.fail("shards", f"the index and the shards do not belong together: {_names(facts.strays)}", fetch)
    weights = [file for file in facts.files if file.name in facts.weights]
    if not weights and not facts.missing:
        report.fail("shards", f"{facts.path} has no weights (*.safetensors)", fetch)
    elif not broken and not facts.missing and not facts.strays:
        report.ok("shards", f"{len(weights)} of {len(weights)} are complete, sizes as their headers say")
    return report.findings


def check_memory(nodes: Sequence[NodeFacts], layout: LayoutFacts | None) -> list[Finding]:
    """Whether the model fits: by a plan, or where there can be none, the bytes of its weights against all memory."""
    models = [node.model for node in nodes if node.model is not None and node.model.weight_bytes]
    if not models:
        return []
    report = Reporter(GROUP, nodes[0].name if len(nodes) == 1 else "")
    if trouble := next((trouble for model in models if (trouble := _config_trouble(model))), ""):
        report.skip("memory", f"no plan: {trouble}")
        return report.findings
    mend = "add machines (`shoal node start --address …`), take a quantized copy of the model, or a smaller one"
    if layout is not None and layout.state == "fits":
        report.ok("memory", layout.text)
        return report.findings
    if layout is not None and layout.state == "none":
        report.fail("memory", layout.text, mend)
        return report.findings
    weight_bytes = max(model.weight_bytes for model in models)
    with_gpus = [node for node in nodes if node.gpus.gpus and node.versions.torch.cuda]
    if with_gpus:
        total = sum(gpu.total_bytes for node in with_gpus for gpu in node.gpus.gpus)
        what = f"{sum(len(node.gpus.gpus) for node in with_gpus)} GPUs have {format_size(total)}"
    else:
        total = sum(node.usable_memory_bytes for node in nodes)
        what = f"{len(nodes)} machine{'s' * (len(nodes) > 1)} without a GPU: {format_size(total)} of memory"
    why = f" (no plan: {layout.text})" if layout is not None else ""
    seen = f"{format_size(weight_bytes)} of weights; {what}{why}"
    if weight_bytes >= total:
        report.fail("memory", f"{seen}: that is not enough", mend)
    elif weight_bytes > 0.85 * total:
        report.warn("memory", f"{seen}: little is left for the KV cache", mend)
    else:
        report.ok("memory", seen)
    return report.findings


def check_equal(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """That all machines have the same files: by their sums where they were taken, else by their sizes."""
    having = [(node.name, node.model) for node in nodes if node.model is not None and node.model.path]
    if len(having) < 2:
        return []
    report = Reporter(GROUP, "")
    files = [{file.name: file for file in model.files} for _, model in having]
    names = sorted({name for each in files for name in each})
    hashed = all(file.sha256 or file.problem for each in files for file in each.values())
    for name in names:
        by_content: dict[str, list[str]] = {}
        for (node, _), each in zip(having, files, strict=True):
            by_content.setdefault(_content(each.get(name), hashed), []).append(node)
        if len(by_content) < 2:
            continue
        common = max(by_content, key=lambda content: len(by_content[content]))
        seen = "; ".join(f"{content} on {', '.join(where)}" for content, where in by_content.items())
        others = [node for content, where in by_content.items() if content != common for node in where]
        source = by_content[common][0]
        tie = len(by_content[common]) == max(len(where) for c, where in by_content.items() if c != common)
        wrong = "one of them is wrong" if tie else f"{', '.join(others)} differ{'s' * (len(others) == 1)} from the rest"
        path = next(model.path for node, model in having if node == others[0])
        report.fail(
            "same files",
            f"{name} is not the same everywhere, {wrong}: {seen}",
            f"`shoal verify {path} --cluster` names what differs; copy {name} to {', '.join(others)} from {source}",
        )
    if not report.findings:
        how = f"equal SHA-256 sums of {len(names)} files" if hashed else f"equal names and sizes of {len(names)} files"
        report.ok("same files", f"{how} on {len(having)} nodes")
    return report.findings


def _config_trouble(facts: ModelFacts) -> str:
    """Why the model's config.json cannot be used; "": it can."""
    config = next((file for file in facts.files if file.name == _CONFIG), None)
    if config is None:
        return f"there is no {_CONFIG}"
    return f"{_CONFIG} {config.problem}" if config.problem else ""


def _content(file: ModelFile | None, hashed: bool) -> str:
    if file is None:
        return "missing"
    return f"SHA-256 {file.sha256[:12]}…" if hashed and file.sha256 else f"{file.size} bytes"


def _what_is_wrong(file: ModelFile) -> str:
    if file.problem:
        return file.problem
    if file.expected_bytes < 0 or file.size == file.expected_bytes:
        return ""
    how = "cut short" if file.size < file.expected_bytes else "too long"
    return f"{how}: {file.size} bytes, and by its header {file.expected_bytes}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
