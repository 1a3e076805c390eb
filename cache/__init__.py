"""How teacher logits are stored: record, fingerprint, manifest, shards, writer, reader. Imports neither torch nor vllm."""
