"""Evaluations: perplexity, generated answers, choices, gists and tasks, and the comparison of two models.

Not named `evaluate`: a package of that name would replace the function `surgeon.evaluate` once it is imported.
"""
