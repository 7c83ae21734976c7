"""The parts of a checkpoint: named axes, the families' tables, and the config that follows the layers."""
