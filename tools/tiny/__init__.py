"""How shoal-tiny is made: the corpus, the tokenizer, the training loop, the evaluation.

Called by tools/train_tiny.py.
"""
