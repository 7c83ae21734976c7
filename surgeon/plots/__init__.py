"""Pictures, drawn with matplotlib (the extra `plot`), one a file."""
