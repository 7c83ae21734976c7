"""One file for each command: the work of the command and of the Python call of that name."""
