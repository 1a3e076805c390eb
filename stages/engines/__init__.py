"""Raw top-k logits from vLLM or transformers."""
