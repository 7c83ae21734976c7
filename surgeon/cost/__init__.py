"""What a run costs: operations, memory, time. For progress, dry runs and advice."""
