"""Each family's table of tensors. Data only: a table says what the files hold, and no code names a family."""

from collections.abc import Mapping

from surgeon.anatomy.families.decoders import DECODERS
from surgeon.anatomy.families.experts import EXPERTS
from surgeon.anatomy.families.table import Family, Kind, Row, Rows

__all__ = ["FAMILIES", "Family", "Kind", "Row", "Rows"]

FAMILIES: Mapping[str, Family] = {**DECODERS, **EXPERTS}
