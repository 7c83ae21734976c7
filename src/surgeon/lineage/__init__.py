"""Lineage: which model a checkpoint was made from, and how, by small samples of the weights of both."""
