"""Pictures, drawn with matplotlib (the extra `plot`), one per file."""
