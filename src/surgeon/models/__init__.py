"""A transformers model: loading it, running it layer by layer, and splitting it into decoder and head."""
