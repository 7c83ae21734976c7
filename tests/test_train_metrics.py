"""metrics.jsonl and status.json: every line is there, none is half, and a resumed run's file is as if never killed."""

import json
import math
import subprocess
import sys

import pytest

from surgeon.errors import DataError, OutputError
from surgeon.train.run_dir import METRICS, EvalReport, MetricsLog, StepReport, read_metrics, write_status


def test_each_record_is_a_line_that_is_there_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 2.5})
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": 2.5}\n'
    log.write({"step": 2, "loss": 2.0, "note": "π\u2028"})

    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "note": "π\u2028"}]
    assert read_metrics(tmp_path / METRICS) == read_metrics(tmp_path)


def test_a_record_needs_its_step(tmp_path):
    with pytest.raises(KeyError):
        MetricsLog(tmp_path).write({"loss": 2.5})


def test_what_is_not_finite_is_null_for_others_and_comes_back_for_us(tmp_path):
    MetricsLog(tmp_path).write({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "learning_rate": 0.1})

    plain = json.loads((tmp_path / METRICS).read_text(), parse_constant=pytest.fail)
    assert plain["loss"] is None
    assert plain["not_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == -math.inf
    assert "not_finite" not in record


def test_a_resumed_run_drops_what_comes_again_and_half_a_line(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 4.0 - step})
    log.write({"step": 3, "eval_loss": 1.5})
    before = (tmp_path / METRICS).read_text().splitlines(keepends=True)
    log.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "lo')

    log = MetricsLog(tmp_path)
    log.resume_at(3)

    assert (tmp_path / METRICS).read_text() == "".join([*before[:3], before[4]])
    log.write({"step": 4, "loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_half_a_line_is_not_read(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')

    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "metrics.jsonl:2: Expecting"),
        ("[1]", "metrics.jsonl:2: not an object"),
        ('{"loss": 1.0}', "metrics.jsonl:2: a record without its step"),
        ('{"step": true}', "metrics.jsonl:2: a record without its step"),
        ('{"step": 2, "not_finite": {"loss": "much"}}', "metrics.jsonl:2: could not convert"),
        ('{"step": 2, "not_finite": 3}', "metrics.jsonl:2: "),
    ],
)
def test_a_damaged_line_is_named(line, said, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n' + line + "\n")

    with pytest.raises(DataError) as caught:
        read_metrics(tmp_path)
    assert said in str(caught.value)


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no such run"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        MetricsLog(tmp_path / "nowhere")


def test_a_killed_process_loses_no_line(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom surgeon.train.run_dir import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(50):\n    log.write({'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9

    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(50))


def test_reports_become_records_without_what_is_not_known():
    step = StepReport(step=3, tokens=96, loss=2.0, learning_rate=1e-4, tokens_per_second=32.0, seconds_left=9.0)
    evaluation = EvalReport(step=3, tokens=96, validation=2.5)

    assert step.to_record() == {
        "step": 3, "tokens": 96, "loss": 2.0, "learning_rate": 1e-4, "tokens_per_second": 32.0
    }  # fmt: skip
    assert evaluation.to_record() == {"step": 3, "tokens": 96, "eval_loss": 2.5}


def test_the_status_is_the_last_one_written(tmp_path):
    write_status(tmp_path, "running", step=3)
    write_status(tmp_path, "failed", step=4, exit_code=1, error="the loss is nan", train_loss=math.nan)

    status = json.loads((tmp_path / "status.json").read_text())

    assert status["state"] == "failed"
    assert status["step"] == 4
    assert status["exit_code"] == 1
    assert status["error"] == "the loss is nan"
    assert status["train_loss"] is None
    assert status["not_finite"] == {"train_loss": "nan"}
    assert status["updated"].endswith("+00:00")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_metrics_of_an_older_surgeon_are_read_in_the_words_of_today(tmp_path):
    """Its loss was the objective, and the cross-entropy stood beside it."""
    old = '{"step": 1, "loss": 1.5, "cross_entropy": 2.0, "kl": 1.0}\n{"step": 2, "loss": 3.0, "cross_entropy": 3.25}\n'
    (tmp_path / METRICS).write_text(old)
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.0, "kl": 1.0, "objective": 1.5},
        {"step": 2, "loss": 3.25},
    ]
