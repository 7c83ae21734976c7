"""Data: documents from files and from the Hub, and the rows of tokens that scores are computed on."""
