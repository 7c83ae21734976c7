"""Self-data distillation: a model rewrites the answers of a dataset, which train what is cut from it."""
