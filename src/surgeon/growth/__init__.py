"""Growth that is trained: its operator as a module of torch, and the run that trains it."""
