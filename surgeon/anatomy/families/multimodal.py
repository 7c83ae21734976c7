"""Models around a language model: where its tensors lie in the files, and what beside it has its axes. Data only.

Each type lists its layouts, the one that transformers writes today first, then those of older checkpoints.
"""

from collections.abc import Mapping

from surgeon.anatomy.families.table import Wrapper

MULTIMODAL: Mapping[str, tuple[Wrapper, ...]] = {}
