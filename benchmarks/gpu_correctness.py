"""Whether what runs on a GPU is right: every family's greedy tokens and log-probabilities beside Transformers'.

    python benchmarks/gpu_correctness.py [--families llama,opt] [--settings graphs,eager] [--tp 2]

Random checkpoints of realistic shapes; prompts of 1 to 2,000 tokens in batches of 1 to 64, then prompts that begin as
earlier ones did, and some that begin as others of the same step do. Transformers is asked about our own tokens, in one
forward pass over prompt and answer, so that each position is judged by itself, whatever came before. Its float32 logits
are the truth; how far its bfloat16 ones are from them is the rounding noise. A token may differ from the truth's best
only where the truth prefers that by no more than the noise allows; log-probabilities may be 0.05 away, or as far as the
noise. Prints a table; exits with 1 on a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError
from shoal.messages import CoreReady
from shoal.types import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import Answer, run_engine
from tests.engine.simulated_executor import InMemoryChannel

LENGTHS = (
    100, 1, 2000, 17, 3, 1023, 64, 2, 129, 511, 33, 16, 1500, 255, 7, 1025, 128, 31, 700, 15, 257, 1999, 127, 400,
)  # fmt: skip
WAVES = (1, 2, 7, 17, 33, 64)
NUM_OUTPUT = 16
VOCAB_SIZE = 8192
LOGPROB_TOLERANCE = 0.05
# Two roundings of one number lie apart by more than their usual distance now and then; over some thousand numbers this
# many times that, if they are spread as a bell curve. Log-probabilities have longer tails (after short prompts, say):
# there the worst of ours may be so many times Transformers' worst.
_NOISE_TIMES = 6.0
_WORST_TIMES = 1.5
_FP32_NOISE = 2e-3
_GAIN, _TIED_GAIN = 0.5, 0.15

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5632},
    "mistral": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 5632,
        "sliding_window": 600,
    },
    "qwen2": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 4864},
    "qwen3": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "opt": {"hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096, "word_embed_proj_dim": None},
    # Layers as large as Llama-3.1-8B's: two GPUs compute steps of many tokens in halves.
    "llama-large": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
}
COMMON = {"num_hidden_layers": 4, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 2560}


def soften(path: Path, is_tied: bool) -> None:
    """Weaken the layers of a checkpoint of the tests', and its embedding where that is the head as well: at these sizes
    they are so strong that roundings grow from layer to layer, and the noise would hide mistakes."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "embed" in name:
            tensor *= _TIED_GAIN if is_tied else 1.0
        elif tensor.dim() > 1 and "lm_head" not in name or name.endswith(".bias"):
            tensor *= _GAIN
    save_file(tensors, file, metadata={"format": "pt"})


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the engine runs. same_as: another setting whose tokens, and log-probabilities where both have them, must be
    the same to the bit."""

    options: dict[str, Any]
    with_logprobs: bool = True
    same_as: str | None = None

    @property
    def dtype(self) -> str:
        return str(self.options.get("dtype", "bfloat16"))


SETTINGS = {
    "graphs": Setting({}),
    "graphs, tokens only": Setting({}, with_logprobs=False),
    "chunks of 512": Setting({"max_num_batched_tokens": 512}),
    "eager": Setting({"enforce_eager": True}),
    "fp32 graphs": Setting({"dtype": "float32"}, with_logprobs=False),
    "fp32 eager": Setting({"dtype": "float32", "enforce_eager": True}, with_logprobs=False, same_as="fp32 graphs"),
    "deterministic": Setting({"deterministic": True}),
    "deterministic, chunks of 512": Setting(
        {"deterministic": True, "max_num_batched_tokens": 512, "max_num_seqs": 24}, same_as="deterministic"
    ),
}


def make_waves(with_logprobs: bool) -> list[list[EngineRequest]]:
    """The same prompts every time. Each wave is served to its end before the next comes."""
    generator = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, VOCAB_SIZE) for _ in range(count)]

    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=2 if with_logprobs else None
    )
    waves, first, index = [], [], 0
    for size in WAVES:
        prompts = [tokens(LENGTHS[(index + offset) % len(LENGTHS)]) for offset in range(size)]
        index += size
        first += prompts
        waves.append(prompts)
    waves.append([prompt[: max(1, len(prompt) * 2 // 3)] + tokens(5) for prompt in first[-32:]])
    shared = tokens(500)
    waves.append([shared + tokens(min(length, 1000)) for length in LENGTHS])
    return [
        [EngineRequest(f"{wave}-{index}", prompt, params) for index, prompt in enumerate(prompts)]
        for wave, prompts in enumerate(waves)
    ]


class Reference:
    """Transformers' model of one checkpoint, in both data types, on the device."""

    def __init__(self, path: Path, device: str) -> None:
        self._models = {
            dtype: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
            for dtype in (torch.float32, torch.bfloat16)
        }
        self._device = device

    @torch.inference_mode()
    def logits(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [answer, vocabulary], twice: before each token of the answer, computed in float32 and in bfloat16."""
        ids = torch.tensor([prompt + answer[:-1]], device=self._device)
        exact, rounded = (model(ids).logits[0, len(prompt) - 1 :].float() for model in self._models.values())
        return exact, rounded


@dataclasses.dataclass
class Verdict:
    """What was found over all positions of all answers.

    noise, distance: root mean squares of the log-probabilities' distance from the truth, Transformers' and ours.
    """

    num_tokens: int = 0
    num_different: int = 0
    worst_margin: float = 0.0
    noise: float = 0.0
    worst_noise: float = 0.0
    distance: float | None = None
    worst_distance: float = 0.0
    num_cached: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


def judge(
    requests: list[EngineRequest], answers: dict[str, Answer], reference: Reference, is_fp32: bool, has_cache: bool
) -> Verdict:
    """Compare all answers with the reference."""
    verdict, margins, noises, logit_noises, distances = Verdict(), [], [], [], []
    for request in requests:
        answer = answers[request.request_id]
        if len(answer.token_ids) != NUM_OUTPUT:
            verdict.failures.append(f"{request.request_id} has {len(answer.token_ids)} tokens")
            continue
        exact, rounded = reference.logits(list(request.prompt_token_ids), answer.token_ids)
        chosen = torch.tensor(answer.token_ids, device=exact.device)[:, None]
        margins.append(exact.max(dim=-1).values - exact.gather(1, chosen)[:, 0])
        truth, theirs = (torch.log_softmax(logits, -1).gather(1, chosen)[:, 0] for logits in (exact, rounded))
        noises.append(theirs - truth)
        best = exact.topk(2, dim=-1).indices
        logit_noises.append((rounded - exact).gather(1, best).flatten())
        if answer.logprobs:
            ours = torch.tensor([entry.logprobs[0] for entry in answer.logprobs], device=exact.device)
            distances.append(ours - truth)
        verdict.num_cached += answer.num_cached_tokens
    if not margins:
        return verdict
    margin, noise, logit_noise = torch.cat(margins), torch.cat(noises), torch.cat(logit_noises)
    verdict.num_tokens, verdict.num_different = margin.numel(), int((margin > 0).sum())
    verdict.worst_margin = float(margin.max())
    verdict.noise, verdict.worst_noise = _size(noise), float(noise.abs().max())
    # A difference of two logits, each rounded anew by us: twice the square of the noise.
    allowed = _FP32_NOISE if is_fp32 else _NOISE_TIMES * 2**0.5 * _size(logit_noise)
    if verdict.worst_margin > allowed:
        verdict.failures.append(f"a token the truth likes {verdict.worst_margin:.3f} less; {allowed:.3f} is allowed")
    if distances:
        distance = torch.cat(distances)
        verdict.distance, verdict.worst_distance = _size(distance), float(distance.abs().max())
        most = max(LOGPROB_TOLERANCE, _NOISE_TIMES * verdict.noise, _WORST_TIMES * verdict.worst_noise)
        if not verdict.worst_distance <= most:  # "not": NaN is too far
            index, position = divmod(int(distance.abs().argmax()), NUM_OUTPUT)
            place = f"token {position} after a prompt of {len(requests[index].prompt_token_ids)}"
            verdict.failures.append(
                f"a log-probability {verdict.worst_distance:.3f} away ({place}); {most:.3f} is allowed"
            )
        if not verdict.distance <= 1.5 * verdict.noise + 1e-3:
            verdict.failures.append(f"rounds more than Transformers: {verdict.distance:.4f}, {verdict.noise:.4f}")
    if has_cache and not verdict.num_cached:
        verdict.failures.append("no prefix was found in the cache")
    return verdict


def _size(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def same(one: dict[str, Answer], other: dict[str, Answer]) -> list[str]:
    """Where two settings' answers differ."""
    found = []
    for name, answer in one.items():
        if answer.token_ids != other[name].token_ids:
            found.append(f"{name}: other tokens")
        elif answer.logprobs and other[name].logprobs and answer.logprobs != other[name].logprobs:
            found.append(f"{name}: other log-probabilities")
    return [f"{len(found)} answers differ from the other setting's, such as {found[0]}"] if found else []


def run_family(family: str, names: list[str], arguments: argparse.Namespace) -> int:
    """One checkpoint under every setting; returns the number of failed ones."""
    num_failed = 0
    shape = {**SHAPES[family], **COMMON}
    if arguments.small:
        shape |= {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
        shape |= {"num_key_value_heads": 2} if "num_key_value_heads" in shape else {}
    with tempfile.TemporaryDirectory() as directory:
        path = make_checkpoint(
            Path(directory) / family, family.split("-")[0], dtype=torch.bfloat16, max_shard_size="100GB", **shape
        )
        soften(path, is_tied=family in ("qwen2", "opt"))
        reference = Reference(path, arguments.device)
        seen: dict[str, dict[str, Answer]] = {}
        for name in names:
            line, failures = run_setting(path, name, reference, seen, arguments)
            num_failed += bool(failures)
            print(f"| {family} | {name} | {line} | {'; '.join(failures) or 'ok'} |", flush=True)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    return num_failed


def run_setting(
    path: Path, name: str, reference: Reference, seen: dict[str, dict[str, Answer]], arguments: argparse.Namespace
) -> tuple[str, list[str]]:
    """The middle of the table's line, and what is wrong."""
    setting, started = SETTINGS[name], time.perf_counter()
    waves = make_waves(setting.with_logprobs)
    options: dict[str, Any] = {
        "model": str(path),
        "dtype": "bfloat16",
        "device": arguments.device,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "num_gpu_blocks_override": 6000,
        "tensor_parallel_size": arguments.tp,
    }
    try:
        channel = InMemoryChannel()
        answers, _ = run_engine(make_engine_config(**(options | setting.options)), *waves, channel=channel)
        (ready,) = (message for message in channel.sent if isinstance(message, CoreReady))
        if arguments.tp > 1:
            print(
                f"{path.name}, {name}: sums over ranks: {ready.info.get('all_reduce', 'as of CPUs')}", file=sys.stderr
            )
        seen[name] = answers
        verdict = judge(
            [request for wave in waves for request in wave],
            answers,
            reference,
            setting.dtype == "float32",
            has_cache=True,
        )
    except ConfigError as error:
        return f"not served: {str(error)[:80]} | – | – | –", []
    except Exception as error:
        traceback.print_exc(limit=-4)
        return "– | – | – | –", [f"{type(error).__name__}: {str(error)[:200]}"]
    failures = list(verdict.failures)
    if setting.same_as in seen:
        failures += same(answers, seen[setting.same_as])
    ours = "–" if verdict.distance is None else f"{verdict.distance:.4f}, {verdict.worst_distance:.3f}"
    line = (
        f"{verdict.num_different} of {verdict.num_tokens}, {verdict.worst_margin:.4f} | "
        f"{verdict.noise:.4f}, {verdict.worst_noise:.3f} | {ours} | {time.perf_counter() - started:.1f} s"
    )
    return line, failures


def names_of(text: str | None, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(";" if ";" in text else ",")] if text else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"{name!r} is not among {'; '.join(known)} (a list with commas in it is split at ';')")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--settings", help=f"some of {'; '.join(SETTINGS)}")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program itself")
    arguments = parser.parse_args()
    families, settings = names_of(arguments.families, SHAPES), names_of(arguments.settings, SETTINGS)
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.tp:
        raise SystemExit(
            f"--tp {arguments.tp} takes as many GPUs, and torch {torch.__version__} finds {torch.cuda.device_count()} "
            "here; --device cpu --small tries the program itself"
        )
    transformers.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, Transformers {transformers.__version__}, TP={arguments.tp}\n")
    print(
        "| family | setting | tokens that are not the truth's best, worst margin | noise of Transformers' bf16: "
        "rms, worst | ours: rms, worst | time | verdict |\n|---|---|---|---|---|---|---|"
    )
    num_failed = 0
    for family in families:
        num_failed += run_family(family, settings, arguments)
    print(f"\n{num_failed} failed" if num_failed else "\nall is right")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
