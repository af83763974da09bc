#!/usr/bin/env python3
"""Make shoal-tiny from scratch: generate its corpus, train its tokenizer and its weights, and measure it.

python tools/train_tiny.py --max-seconds 310 --workers 14    # on one GPU, minutes
python tools/train_tiny.py --steps 3 --out /tmp/smoke        # a smoke run on a CPU
python tools/train_tiny.py --evaluate                        # measure the model that ships with Shoal
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHIPPED = ROOT / "shoal" / "assets" / "shoal-tiny"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    # Imported here and not above: the workers that generate the corpus load this file too, and need none of it.
    from tools.tiny.evaluation import evaluate, show_samples
    from tools.tiny.tokenizer import save_tokenizer, train_tokenizer
    from tools.tiny.training import Plan, train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the model folder to write or to measure")
    parser.add_argument("--seed", type=int, default=0, help="of the tokenizer, the weights and the corpus")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="the most steps to train")
    parser.add_argument("--max-seconds", type=float, default=Plan.max_seconds, help="the most seconds to train")
    parser.add_argument("--batch-tokens", type=int, default=Plan.batch_tokens, help="tokens in one step")
    parser.add_argument("--longest-row", type=int, default=Plan.longest_row, help="the most tokens in one row")
    parser.add_argument("--workers", type=int, default=0, help="processes that generate the corpus; 0: in this one")
    parser.add_argument("--log-every", type=int, default=Plan.log_every, help="steps between two lines of the log")
    parser.add_argument("--items", type=int, default=200, help="held-out items of each kind to evaluate on")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    parser.add_argument("--skip-evaluation", action="store_true", help="only train")
    parser.add_argument("--samples", action="store_true", help="also print what the model says to a list of prompts")
    options = parser.parse_args(arguments)

    if not options.evaluate:
        tokenizer = train_tokenizer(options.seed)
        save_tokenizer(tokenizer, options.out)
        plan = Plan(
            out=options.out,
            seed=options.seed,
            steps=options.steps,
            max_seconds=options.max_seconds,
            batch_tokens=options.batch_tokens,
            longest_row=options.longest_row,
            num_workers=options.workers,
            log_every=options.log_every,
        )
        train(plan, tokenizer)
    if not options.skip_evaluation:
        evaluate(options.out, options.items)
    if options.samples:
        show_samples(options.out)


if __name__ == "__main__":
    main()
