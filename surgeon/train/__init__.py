"""Training: data as rows of tokens, losses whose logits never exist whole, and runs that can be killed."""
