"""Model directories: found, identified, loaded; and which row of logits predicts which token."""
