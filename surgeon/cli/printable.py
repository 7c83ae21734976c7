"""What a terminal is shown of text that comes from a checkpoint."""


def printable(text: str) -> str:
    """Return text without the control characters that a hostile checkpoint could put into a name."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
