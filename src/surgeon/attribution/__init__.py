"""Attribution: which rows of the data taught a model what it does, and which rows to train next."""
