"""How logits are stored: the format, its readers and its writers. Needs neither torch nor vLLM."""
