"""Each family's table of tensors. Data only: a table says what the files hold, and no code names a family."""

from collections.abc import Mapping

from surgeon.anatomy.families.classics import CLASSICS
from surgeon.anatomy.families.decoders import DECODERS
from surgeon.anatomy.families.encoder_decoders import ENCODER_DECODERS
from surgeon.anatomy.families.encoders import ENCODERS
from surgeon.anatomy.families.experts import EXPERTS
from surgeon.anatomy.families.hybrids import HYBRIDS
from surgeon.anatomy.families.multimodal import MULTIMODAL, TEXT_MODELS
from surgeon.anatomy.families.table import (
    ANY,
    FIRST,
    LATER,
    UNTIED,
    Family,
    Kind,
    Layers,
    Row,
    Rows,
    Wrapper,
    written_and_read,
)

__all__ = ["ANY", "FAMILIES", "FIRST", "LATER", "MULTIMODAL", "UNTIED", "table_of_mlp"]
__all__ += ["Family", "Kind", "Layers", "Row", "Rows", "Wrapper", "written_and_read"]

FAMILIES: Mapping[str, Family] = {
    **CLASSICS,
    **DECODERS,
    **ENCODERS,
    **ENCODER_DECODERS,
    **EXPERTS,
    **HYBRIDS,
    **TEXT_MODELS,
}


def table_of_mlp(model_type: str) -> Family | None:
    """Return the table of a type that names its MLP alone, None where there is none."""
    from surgeon.anatomy.families.partial import PARTIAL  # 150 types that few runs ask for

    return PARTIAL.get(model_type)
