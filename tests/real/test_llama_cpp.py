"""What the notes say of llama.cpp is what llama.cpp does: its own converter and runtime are the judge."""

import llama_cpp
import pytest
from later import LATER

if LATER:
    import runtimes

CLOSE = 0.01  # gelu and silu are looked up in 16 bits there; what is computed wrongly is off by 0.1 and more

pytestmark = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@pytest.mark.real
@pytest.mark.parametrize("family", ["gemma2", "smollm3", "granite"])
def test_a_result_has_a_note_exactly_where_llama_cpp_computes_something_else(family, tmp_path):
    made, _, notes = runtimes.results_of(family, tmp_path)

    found = runtimes.differences(made, tmp_path)

    wrong = {name for name, value in found.items() if isinstance(value, str) or value > CLOSE}
    assert wrong == {name for name in made if notes[name]}
    assert found["as published"] < CLOSE
    assert wrong
