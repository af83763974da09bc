"""Shoal against Hugging Face `generate` on this machine's CPU: one run, the two interleaved.

    python benchmarks/cpu.py [--rounds 3] [--batch 1 16] [--output-tokens 64]

Model: the 386.6 M parameter Qwen2 shape, random weights (the same for both), bfloat16, all cores, prefill included,
greedy, end tokens ignored. Prints output tokens per second, medians over the rounds, and the ratio round by round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from rich.console import Console
from rich.table import Table

from shoal import LLM, SamplingParams

SHAPE = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def make_model(directory: str) -> transformers.PreTrainedModel:
    """A random bfloat16 model, saved where Shoal reads it."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(directory)
    print(f"model: Qwen2 shape, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, bfloat16")
    return model


def hugging_face(model: transformers.PreTrainedModel, prompts: list[list[int]], num_output: int) -> None:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_output,
            max_new_tokens=num_output,
            pad_token_id=0,
        )
    assert output.shape[1] == ids.shape[1] + num_output


def shoal(llm: LLM, prompts: list[list[int]], num_output: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == num_output for output in outputs)


def seconds_of(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table = Table("batch", "Hugging Face tok/s", "Shoal tok/s", "ratio (median)", "ratios, round by round")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(directory)
        llm = LLM(
            model=directory,
            dtype="bfloat16",
            device="cpu",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=arguments.input_tokens + arguments.output_tokens,
        )
        with llm:
            generator = torch.Generator().manual_seed(1)
            for batch in arguments.batch:
                shape = (batch, arguments.input_tokens)
                prompts = torch.randint(1, SHAPE["vocab_size"], shape, generator=generator).tolist()
                num_output, rates = arguments.output_tokens, []
                for index in range(arguments.rounds + 1):
                    theirs = seconds_of(lambda: hugging_face(model, prompts, num_output))  # noqa: B023
                    ours = seconds_of(lambda: shoal(llm, prompts, num_output))  # noqa: B023
                    if index:  # the first round warms both up
                        rates.append((batch * num_output / theirs, batch * num_output / ours))
                ratios = [ours / theirs for theirs, ours in rates]
                table.add_row(
                    str(batch),
                    f"{statistics.median(theirs for theirs, _ in rates):.1f}",
                    f"{statistics.median(ours for _, ours in rates):.1f}",
                    f"{statistics.median(ratios):.2f}",
                    " ".join(f"{ratio:.2f}" for ratio in ratios),
                )
    print(f"{torch.get_num_threads()} threads, {arguments.input_tokens} tokens in, {arguments.output_tokens} out")
    Console().print(table)


if __name__ == "__main__":
    main()
