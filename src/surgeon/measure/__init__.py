"""Measurements on real text: a forward pass that streams the weights, and the scores that are taken from it."""
