"""Reading and writing checkpoints: headers, sources, the streaming writer, the output directory."""
