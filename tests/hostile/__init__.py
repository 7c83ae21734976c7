"""Bad input of every kind that surgeon reads, made on the fly: CASES lists them, BASES the sound input they begin with.

A case is a sound input, one damage, and the commands that read it. `python benchmarks/hostile_inputs.py` runs them all.
"""

from hostile import checkpoints, pickles, records, texts
from hostile.bases import BASES, COMMANDS, Case, words_of

CASES: tuple[Case, ...] = (*checkpoints.cases(), *pickles.cases(), *texts.cases(), *records.cases())

__all__ = ["BASES", "CASES", "COMMANDS", "Case", "words_of"]
