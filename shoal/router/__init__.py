"""The router: one entrance to several servers, which it knows by HTTP alone. No torch, no tokenizer."""
