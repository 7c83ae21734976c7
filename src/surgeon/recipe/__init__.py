"""Recipes: chains of commands in YAML, checked before anything runs, fused where they can be, and resumed."""
