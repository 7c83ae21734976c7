"""What a checkpoint is made of: named axes, the families' tables, and the config that follows the layers."""
