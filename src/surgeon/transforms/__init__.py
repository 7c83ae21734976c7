"""Surgeries: pure functions from an anatomy and options to a plan."""
