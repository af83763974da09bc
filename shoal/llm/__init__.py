"""Offline use: `LLM` generates for lists of prompts in the user's own program."""

from shoal.llm.llm import LLM

__all__ = ["LLM"]
