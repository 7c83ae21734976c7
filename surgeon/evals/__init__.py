"""What a model is worth: perplexity, generated answers, choices between answers, and two models compared.

Named so because `surgeon.evaluate` is the function: a package of that name would take its place once it is imported.
"""
