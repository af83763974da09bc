"""Generate without a server. No main guard is needed.

.venv/bin/python examples/offline.py [MODEL]
"""

import sys

from shoal import LLM, SamplingParams

prompts = ["What is 12 + 30?", "数到 7", "Sort 31, 4, 15, 9"]
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100, seed=1)
with LLM(model=sys.argv[1] if len(sys.argv) > 1 else "shoal-tiny") as llm:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for prompt, output in zip(prompts, llm.chat(conversations, params), strict=True):
        print(f"{prompt} -> {output.outputs[0].text} ({output.outputs[0].finish_reason})")
