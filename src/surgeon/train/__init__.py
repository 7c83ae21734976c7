"""Training: data as rows of tokens, losses that never hold all logits at once, and runs that can be resumed."""
