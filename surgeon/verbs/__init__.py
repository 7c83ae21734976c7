"""One file a command: what the command and the Python call of that name do."""
