"""The cost of a run: operations, memory, time. For progress, dry runs and advice."""
