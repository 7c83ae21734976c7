"""Parts of datasets on the Hub, and datasets larger than the disk: what is downloaded, and what is stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_hub import DatasetHub
from later import LATER
from test_data_documents import read_in_process

if LATER:
    from surgeon.train.store import ARRAYS

SHARDS, ROWS = 12, 400
LINE = '{{"text": "row {number} of the data, which is a text of some length: {number:0400}"}}\n'


def shard(number: int) -> bytes:
    return "".join(LINE.format(number=number * ROWS + row) for row in range(ROWS)).encode()


def card(info: str = "") -> bytes:
    files = "- config_name: plain\n  default: true\n  data_files:\n  - {split: train, path: 'train-*.jsonl'}\n"
    return f"---\nconfigs:\n{files}{info}---\n".encode()


COUNTED = (
    "dataset_info:\n- config_name: plain\n  features:\n  - {name: text, dtype: string}\n"
    f"  splits:\n  - {{name: train, num_bytes: 1000, num_examples: {SHARDS * ROWS}}}\n"
)


@pytest.fixture
def hub():
    with DatasetHub() as hub:
        files = {f"train-{number:02}.jsonl": shard(number) for number in range(SHARDS)}
        hub.commit("org/big", {"README.md": card(), **files})
        hub.commit("org/counted", {"README.md": card(COUNTED), **files})
        yield hub


def stored(place: Path) -> int:
    """Return the bytes of all files in a directory."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def fetched(hub: DatasetHub) -> set[int]:
    """Return the numbers of the shards of which anything was downloaded."""
    return {int(name[6:8]) for name in hub.fetched() if name.startswith("train-")}


def test_a_part_of_a_dataset_downloads_what_its_rows_take(hub, tmp_path):
    first, across = "org/big:plain:train[:3]", f"org/big[{ROWS - 1}:{ROWS + 1}]"
    percent, unknown = "org/counted[1%:2%]", "org/big[99%:]"

    answers = read_in_process(tmp_path, first, across, percent, unknown, HF_ENDPOINT=hub.endpoint)

    assert [where for where, _ in answers[first]] == [f"org/big:plain:train[{number}]" for number in range(3)]
    assert [text.split()[1] for _, text in answers[across]] == [str(ROWS - 1), str(ROWS)]
    start, stop = (SHARDS * ROWS * percents // 100 for percents in (1, 2))
    assert [where for where, _ in answers[percent]] == [f"org/counted[{number}]" for number in range(start, stop)]
    assert answers[unknown] == {
        "error": "org/big[99%:]: the Hub does not say how many rows org/big has, so it has no percents",
        "hint": "Count them yourself: org/big[:1000] reads the first 1,000.",
    }
    assert fetched(hub) <= {0, 1, 2}, "the shards of these rows, and the next one, which datasets opens ahead"
    assert stored(tmp_path / "home") < len(shard(0)) / 4, "nothing of the data is kept"


READ = """
import json, sys
from pathlib import Path
from talkers import tokenizer_of
from surgeon.data.rows import read_rows
from surgeon.train.tokenise import prepare
store = prepare(["org/big"], tokenizer_of(), directory=Path(sys.argv[1]), sequence_length=64, max_tokens=6000)
rows = read_rows(["org/big"], tokenizer_of(), samples=4, sequence_length=64)
print(json.dumps([store.num_tokens, store.num_pieces, store.sources[0].num_documents, rows.num_tokens]))
"""


def test_of_a_dataset_larger_than_the_disk_only_tokens_are_stored(hub, tmp_path):
    mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    mine |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    mine["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    command = [sys.executable, "-c", READ, str(tmp_path / "store")]
    result = subprocess.run(command, env=mine, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    tokens, pieces, documents, scored = json.loads(result.stdout.splitlines()[-1])
    assert 6000 <= tokens < 7000
    assert documents < ROWS
    assert scored == 4 * 64
    assert fetched(hub) <= {0, 1, 2}, "of twelve: 1,024 documents are tokenised together"
    assert stored(tmp_path / "home") < len(shard(0)) / 4
    arrays = sum((tmp_path / "store" / name).stat().st_size for name in ARRAYS)
    assert arrays == 5 * tokens + 18 * pieces + 8, "what docs/finetune.md says"
