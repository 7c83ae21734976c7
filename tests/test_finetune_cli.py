"""`surgeon finetune` as users run it: what is printed where, exit codes, refusals, and what a stopped run leaves."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import talkers

from surgeon.train import run_dir as run_files
from surgeon.train.checkpoints import check, checkpoints
from surgeon.train.run_dir import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def words(**options: object) -> list[str]:
    """Return options as they are typed."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


SHORT = words(max_steps=4, batch_size=2, sequence_length=32, lr=1e-3, eval_rows=2, save_every=2)
KEYS = {"output", "steps", "tokens", "train_loss", "eval_loss", "tokens_per_second"}  # that scripts rely on


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def refused(outcome, *said: str, code: int = 1) -> None:
    """Check that a command failed with one sentence and at most one hint."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert lines[-1].startswith("hint: ") or lines[-1].startswith("error: "), outcome.err
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err


def test_json_is_one_object_and_progress_goes_to_standard_error(run, talker, text, tmp_path):
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", "--json")

    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert set(found) >= KEYS
    assert (found["output"], found["steps"]) == (str(tmp_path / "out"), 4)
    records = read_metrics(tmp_path / "out.run")
    assert found["eval_loss"] == [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    assert found["tokens"] == records[-1]["tokens"] > 0
    assert found["tokens_per_second"] > 0
    assert "step 4:  validation" in outcome.err
    assert all(character.isprintable() or character == "\n" for character in outcome.err)
    status = json.loads((tmp_path / "out.run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["output"]) == ("done", 0, str(tmp_path / "out"))


def test_what_to_run_next_is_what_the_result_can_do(run, talker, tmp_path):
    import surgeon

    pytest.importorskip("peft")
    surgeon.add_gist(talker, tokens=1).save(tmp_path / "gist")
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "cat", "output": "sat"}\n' * 8)
    frozen = ("--gist", "--gist-reader", "frozen", "--lora", 1, "--keep-adapter")
    wanted = {
        ("--gist",): "surgeon evaluate {} --gist --data held-out.jsonl",
        ("--lora", 1, "--keep-adapter"): f"surgeon evaluate {{}} --data held-out.txt --baseline {tmp_path / 'gist'}",
        frozen: f"surgeon compress {tmp_path / 'gist'} --adapter {{}} --prompt-file prompt.txt",
    }
    for number, (options, expected) in enumerate(wanted.items()):
        output = tmp_path / f"out{number}"
        outcome = run("finetune", tmp_path / "gist", "--data", data, *SHORT, *options, "-o", output, "--quiet")
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        _, _, following = outcome.out.partition("next: ")
        assert following.strip() == expected.format(output)


def test_the_summary_says_losses_the_place_and_what_to_run_next(run, talker, text, tmp_path):
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", "--quiet")

    for expected in ("steps", "train loss", "validation loss", "nats a token", str(tmp_path / "out")):
        assert expected in outcome.out
    assert f"next: surgeon evaluate {tmp_path / 'out'}" in outcome.out
    assert outcome.err == ""
    receipt = json.loads((tmp_path / "out/surgeon.json").read_text())
    assert receipt["command"].startswith(f"surgeon finetune {talker} --data {text} --max-steps 4")


@pytest.mark.parametrize(
    "options", [["--max-steps", "few"], ["--num-processes", "0"], ["--steps", "3"], ["--lora", "big"], ["--kd-weight"]]
)
def test_bad_usage_exits_with_2(options, run, talker, text):
    outcome = run("finetune", talker, "--data", text, *options)

    assert outcome.code == 2
    assert outcome.out == ""
    assert options[0] in outcome.err


def test_data_must_be_named(run, talker):
    outcome = run("finetune", talker, "--max-steps", 1)

    assert outcome.code == 2
    assert "--data" in outcome.err


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--lr", "fast"], "--lr 'fast' is no number", 2),
        (["--epochs", "2"], "--max-steps and --epochs both say", 2),
        (["--num-processes", "2", "--lr", "0"], "--lr is 0", 2),
        (["--dtype", "int8"], "unknown --dtype 'int8'", 2),
        (["--max-shard-size", "huge"], "huge", 2),
        (["--sequence-length", "65"], "sees 64 tokens, not 65", 1),
        (["--data-weights", "1,2"], "--data-weights has 2 numbers for 1 --data", 2),
        (["--freeze", "layers=7"], "--freeze layers=7: there are no such layers", 1),
        (["--freeze", "layers=0-5,embeddings,head,norm"], "unknown --freeze 'norm'", 2),
        (["--train", "cut"], "surgeon.json has none", 1),
        (["--optim", "sgdd"], "unknown --optim 'sgdd'", 2),
        (["--optim", "galore_adamw"], "--optim galore_adamw cannot be used", 1),
        (["--attention", "flash_attention_9"], "flash_attention_9", 1),
        (["--teacher", "no-such-model"], "no-such-model", 1),
    ],
)
def test_a_mistake_in_the_options_is_one_line_and_nothing_is_written(options, said, code, run, talker, text, tmp_path):
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", *options)

    refused(outcome, said, code=code)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.run/checkpoint-*"))


def test_a_directory_that_is_no_checkpoint_is_refused(run, text, tmp_path):
    (tmp_path / "model").mkdir()

    refused(run("finetune", tmp_path / "model", "--data", text, "-o", tmp_path / "out"), "config.json")
    assert not (tmp_path / "out.run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(run, talker, text, toy, tmp_path):
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", "--teacher", toy("llama"))

    refused(outcome, "the teacher gives logits of 131 tokens, the model of 300")
    assert json.loads((tmp_path / "out.run" / "status.json").read_text())["state"] == "failed"


def test_bad_data_are_named_by_file_and_line(run, talker, tmp_path):
    data = talkers.written(tmp_path / "data.jsonl", '{"text": "good"}\n{"text": 5}\n')

    refused(run("finetune", talker, "--data", data, *SHORT, "-o", tmp_path / "out"), f"error: {data}:2: 'text' is a")
    status = json.loads((tmp_path / "out.run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "data.jsonl:2" in status["error"]


def test_an_existing_output_is_refused_before_training(run, talker, text, tmp_path):
    shutil.copytree(talker, tmp_path / "out")
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out")

    refused(outcome, "exists and is not empty", "--overwrite")
    assert not (tmp_path / "out.run").exists()
    assert weights(tmp_path / "out") == weights(talker)


@pytest.mark.parametrize("run_dir", ["out", "out/run"])
def test_a_run_inside_its_output_is_refused_before_training(run_dir, run, talker, text, tmp_path):
    """The output must be empty at the end, so such a run would train for hours and then be refused."""
    outcome = run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", "--run-dir", tmp_path / run_dir)

    refused(outcome, "lies in the output")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["-o", "--run-dir"])
def test_a_place_that_cannot_be_written_is_refused_before_training(option, run, talker, text, tmp_path):
    places = {"-o": tmp_path / "out", "--run-dir": tmp_path / "run"} | {option: tmp_path / "text.txt" / "place"}
    named = [str(word) for pair in places.items() for word in pair]

    refused(run("finetune", talker, "--data", text, *SHORT, *named), "text.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_refused_before_training(run, talker, text, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    options = ["-o", tmp_path / "locked/out", "--run-dir", tmp_path / "run"]

    refused(run("finetune", talker, "--data", text, *SHORT, *options), "locked")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing_and_is_right_about_steps_and_tokens(run, talker, text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = words(epochs=2, batch_size=2, sequence_length=32, lr=1e-3, eval_rows=2, save_every=0)
    planned = run("finetune", talker, "--data", text, *options, "--dry-run", "--json")
    shown = run("finetune", talker, "--data", text, *options, "--dry-run")
    assert list((tmp_path / "here").iterdir()) == []
    done = run("finetune", talker, "--data", text, *options, "--json", "-o", "out")

    plan, result = json.loads(planned.out), json.loads(done.out)
    assert plan["steps"] == result["steps"]
    assert plan["tokens"] == result["tokens"]
    assert f"{plan['steps']:,}" in shown.out
    assert "memory" in shown.out


def test_a_dry_run_counts_the_rows_of_all_processes(run, talker, text):
    options = [*words(epochs=2, batch_size=2, sequence_length=32), "--dry-run", "--json"]
    one, two = (json.loads(run("finetune", talker, "--data", text, *options, "--num-processes", n).out) for n in (1, 2))

    assert two["steps"] == 2 * -(-one["steps"] // 2 // 2)


def test_the_losses_of_a_run_are_drawn_by_surgeon_plot(run, talker, text, tmp_path):
    pytest.importorskip("matplotlib")
    run("finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out")
    outcome = run("plot", tmp_path / "out.run", "-o", tmp_path / "loss.png", "--json")

    found = json.loads(outcome.out)["runs"][0]
    assert found["steps"] == 4
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.run/loss.png").is_file()


@pytest.fixture
def halfway(run, talker, text, tmp_path) -> tuple[list[str], bytes]:
    """Return a command whose run stands at checkpoint-2 of 4 steps, and the weights with which it will end."""
    command = [
        "finetune",
        str(talker),
        "--data",
        text,
        *SHORT,
        "--keep-checkpoints",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert run(*command, "-o", tmp_path / "whole").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    return [*command, "--resume", "-o", str(tmp_path / "out")], weights(tmp_path / "whole")


def test_a_resumed_run_ends_with_the_same_weights_and_each_step_once(run, halfway, tmp_path):
    command, expected = halfway
    assert run(*command).code == 0

    assert weights(tmp_path / "out") == expected
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == [1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_is_taken(run, halfway, tmp_path):
    command, expected = halfway
    shutil.copytree(tmp_path / "kept/checkpoint-4", tmp_path / "run/checkpoint-4")
    file = tmp_path / "run/checkpoint-4/optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    outcome = run(*command)

    assert outcome.code == 0
    assert "checkpoint-4 is damaged: optimizer.pt is truncated" in outcome.err
    assert "validation" in outcome.err.split("checkpoint-4", 1)[1], "steps 3 and 4 were trained again"
    assert weights(tmp_path / "out") == expected


def test_a_run_is_not_resumed_with_other_data(run, halfway, text, tmp_path):
    command, _ = halfway
    Path(text).write_text(talkers.TEXT * 4 + "One more sentence.")

    refused(run(*command), "text.txt")
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_in_another_number_of_processes(run, halfway, monkeypatch, tmp_path):
    """A step has the rows of all processes, so that half as many processes would train on other steps."""
    command, _ = halfway
    request = json.loads((tmp_path / "run/run.json").read_text())
    request["settings"]["num_processes"] = 2
    (tmp_path / "run/run.json").write_text(json.dumps(request))

    refused(run(*command, "--num-processes", 1), "--num-processes 2, and 1")


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_file_system_that_refuses_a_checkpoint_costs_nothing_but_that_one(run, halfway, tmp_path):
    """Files of over 0.6 MB cannot be written: of a checkpoint the weights (0.5 MB) can, the optimizer's 1.1 cannot."""
    command, expected = halfway
    with limited(resource.RLIMIT_FSIZE, 600_000):
        outcome = run(*command)

    refused(outcome, str(tmp_path / "run"))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    check(tmp_path / "run/checkpoint-2")
    assert not list((tmp_path / "run").glob(".checkpoint-*"))
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert run(*command).code == 0
    assert weights(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 4 MB: room for two checkpoints of 1.7 MB, and not for a third."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_costs_nothing_but_the_checkpoint_that_did_not_fit(run, talker, text, small_disk, tmp_path):
    options = words(max_steps=4, batch_size=2, sequence_length=32, lr=1e-3, eval_rows=2)
    options += ["--save-every", "1", "--keep-checkpoints", "4"]
    command = ["finetune", talker, "--data", text, *options, "--run-dir", small_disk / "run"]
    refused(run(*command, "-o", tmp_path / "out"), "free", str(small_disk))
    left = checkpoints(small_disk / "run")
    assert left
    for path in left:
        check(path)
    assert not (tmp_path / "out").exists()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(*command, "-o", tmp_path / "out", "--resume").code == 0
    command[-1] = tmp_path / "roomy"
    assert run(*command, "-o", tmp_path / "whole").code == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_full_memory_says_what_to_lower(run, talker, tmp_path):
    text = talkers.written(tmp_path / "long.txt", talkers.TEXT * 300)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    options = words(max_steps=1, batch_size=4096, sequence_length=64, eval_rows=1, lr=1e-3)
    with limited(resource.RLIMIT_AS, used + 300_000_000):
        outcome = run("finetune", talker, "--data", text, *options, "-o", tmp_path / "out")

    refused(outcome, "the memory is full", "4096 rows", "Lower --batch-size")
    assert json.loads((tmp_path / "out.run" / "status.json").read_text())["state"] == "failed"


def signalled(*orders: tuple[list[str], Path, int]) -> list[tuple[int, str, str]]:
    """Start commands at once, send each its signal when its run has done a few steps, and return what came of it."""
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "surgeon", *command], stdout=pipe, stderr=pipe, text=True, env=environment
        )
        for command, _, _ in orders
    ]
    waiting = dict(zip(running, orders, strict=True))
    while waiting:
        for process, (_, run_dir, signum) in list(waiting.items()):
            has_begun = (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 3
            if has_begun or process.poll() is not None:
                process.send_signal(signum)
                del waiting[process]
        time.sleep(0.01)
    told = [process.communicate() for process in running]
    return [(process.returncode, *said) for process, said in zip(running, told, strict=True)]


def test_a_run_that_is_told_to_stop_saves_and_ends_as_one_that_was_not(run, talker, text, tmp_path):
    options = words(max_steps=150, batch_size=1, sequence_length=32, lr=1e-3, eval_rows=1, save_every=0)
    options += ["--eval-every", "150", "--gradient-accumulation", "2"]
    command = ["finetune", str(talker), "--data", text, *options]
    (code, out, err), (cut_code, _, cut_err) = signalled(
        ([*command, "-o", str(tmp_path / "out"), "--json"], tmp_path / "out.run", signal.SIGTERM),
        ([*command, "-o", str(tmp_path / "cut")], tmp_path / "cut.run", signal.SIGINT),
    )

    assert (code, cut_code) == (143, 130)
    assert out == ""
    assert f"the newest checkpoint is {tmp_path}/out.run/checkpoint-" in err
    assert f"Continue with: surgeon {shlex.join([*command, '-o', str(tmp_path / 'out'), '--json', '--resume'])}" in err
    assert "interrupted; no checkpoint was written yet. Continue with: surgeon finetune " in cut_err
    status = json.loads((tmp_path / "out.run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    [kept] = checkpoints(tmp_path / "out.run")
    assert 3 <= status["step"] < 150
    assert kept.name == f"checkpoint-{status['step']}"
    check(kept)
    assert "Traceback" not in cut_err
    assert json.loads((tmp_path / "cut.run" / "status.json").read_text())["exit_code"] == 130
    assert not list(tmp_path.glob("cut*/.*"))
    assert {path.name for path in tmp_path.iterdir()} == {"out.run", "cut.run", "text.txt"}

    resumed = run(*command, "-o", tmp_path / "out", "--resume", "--json")
    assert json.loads(resumed.out)["steps"] == 150
    run(*command, "-o", tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# --- a resumed run ----------------------------------------------------------------------------------------------


OTHERS = words(keep_checkpoints=3, workers=0, max_shard_size="100KB", dtype="bfloat16", device="cpu")


@pytest.fixture
def finished(run, talker, text, tmp_path) -> Path:
    """Return the directory of a run that is done."""
    command = ["finetune", talker, "--data", text, *SHORT, *OTHERS, "-o", tmp_path / "out"]
    assert run(*command, "--batch-size", 3).code == 0
    return tmp_path / "out.run"


def test_a_finished_run_is_already_done_and_nothing_is_touched(run, finished, talker, text, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    told = run("finetune", talker, "--resume", "-o", tmp_path / "out")
    repeated = run("finetune", talker, "--data", text, *SHORT, "--batch-size", 3, "--resume", "-o", tmp_path / "out")
    parsed = run("finetune", talker, "--resume", "--run-dir", finished, "--json")

    assert [outcome.code for outcome in (told, repeated, parsed)] == [0, 0, 0], told.err + repeated.err + parsed.err
    expected = f"already done: {tmp_path / 'out'}  (4 steps; the run's files are in {finished})\n"
    assert told.out.startswith(expected)
    assert repeated.out.startswith(expected)
    found = json.loads(parsed.out)
    assert set(found) >= KEYS
    assert (found["already_done"], found["output"], found["steps"]) == (True, str(tmp_path / "out"), 4)
    assert found["eval_loss"] == read_metrics(finished)[-1]["eval_loss"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_whose_output_is_gone_writes_it_again_as_it_was(run, finished, talker, tmp_path):
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("model*")}
    shutil.rmtree(tmp_path / "out")

    outcome = run("finetune", talker, "--resume", "-o", tmp_path / "out", "--json")

    assert json.loads(outcome.out)["already_done"] is False
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("model*")} == before
    assert len(before) > 2, "the size of a shard and the dtype are the run's"


def test_a_run_that_was_killed_after_its_output_and_before_its_status_is_already_done(run, finished, talker, tmp_path):
    """The kill is between a rename and a line of status.json, which still says what it said before."""
    told = (finished / "status.json").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    run_files.write_status(finished, "running", step=4)

    outcome = run("finetune", talker, "--resume", "-o", tmp_path / "out", "--json")

    assert outcome.code == 0, outcome.err
    assert (json.loads(outcome.out)["already_done"], json.loads(outcome.out)["steps"]) == (True, 4)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["receipt"]) == ("done", json.loads(told)["receipt"])
    (finished / "result.json").write_text((finished / "result.json").read_text().replace('"steps": 4', '"steps": 5'))
    run_files.write_status(finished, "running", step=4)
    refused(run("finetune", talker, "--resume", "-o", tmp_path / "out"), "exists and is not empty")


def test_a_finished_run_keeps_what_is_useful_and_says_so(run, talker, text, tmp_path):
    command = ["finetune", talker, "--data", text, *SHORT, "-o", tmp_path / "out", "--save-every", 1]
    done = run(*command)
    whole = run(*command, "-o", tmp_path / "whole", "--keep-checkpoints", 2, "--json")

    assert done.code == whole.code == 0, done.err + whole.err
    [kept] = checkpoints(tmp_path / "out.run")
    check(kept)
    assert kept.name == "checkpoint-4"
    assert not list(kept.glob("optimizer*"))
    assert "kept checkpoint-4 without the optimiser's state, removed " in done.out
    assert "--keep-checkpoints 2 keeps the last two whole" in done.out
    held = sum(path.stat().st_size for path in (tmp_path / "out.run").rglob("*") if path.is_file())
    assert f"{tmp_path}/out.run  (" in done.out
    assert abs(json.loads((tmp_path / "out.run/status.json").read_text())["summary"]["run_bytes"] - held) < 4096
    assert [path.name for path in checkpoints(tmp_path / "whole.run")] == ["checkpoint-3", "checkpoint-4"]
    assert all((path / "optimizer.pt").exists() for path in checkpoints(tmp_path / "whole.run"))
    assert not any("kept" in note for note in json.loads(whole.out)["notes"])

    before = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert json.loads(run(*command, "--resume", "--json").out)["already_done"] is False
    assert weights(tmp_path / "out") == before


def test_an_output_of_another_run_is_not_taken_for_the_runs_own(run, finished, talker, tmp_path):
    (tmp_path / "out/surgeon.json").write_text("{}")

    refused(run("finetune", talker, "--resume", "-o", tmp_path / "out"), "exists and is not empty")


DIFFERENT = {
    "--batch-size 8": "--batch-size 3, and 8 is asked for now",  # the default, and yet another one
    "--max-steps 5": "--max-steps 4, and 5 is asked for now",
    "--dtype keep": "--dtype bfloat16, and keep is asked for now",
    "--teacher {model}": "began without --teacher, and {model} is asked for now",
    "--data {model}": "the data ['{text}'], and ['{model}'] is asked for now",
    "--num-processes 1 --seed 1": "--seed 0, and 1 is asked for now",
}


def test_an_option_that_differs_from_the_runs_own_is_refused_by_name_and_value(run, finished, talker, text, tmp_path):
    for options, said in DIFFERENT.items():
        words = [word.format(model=talker, text=text) for word in options.split()]
        outcome = run("finetune", talker, "--resume", "-o", tmp_path / "out", *words)

        refused(outcome, said.format(model=talker, text=text))


def test_a_killed_run_is_resumed_without_repeating_its_options(run, finished, talker, tmp_path):
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("model*")}
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(finished / "checkpoint-4")

    outcome = run("finetune", talker, "--resume", "--run-dir", finished, "--keep-checkpoints", 1)

    assert outcome.code == 0, outcome.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("model*")} == expected
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-4"], "this option may change"


def test_python_resumes_without_repeating_too_and_refuses_what_differs(finished, talker, tmp_path):
    import surgeon

    assert surgeon.finetune(talker, output=tmp_path / "out", resume=True).already_done
    with pytest.raises(surgeon.PlanError, match="--batch-size 3, and 8 is asked for now"):
        surgeon.finetune(talker, output=tmp_path / "out", resume=True, batch_size=8)
    with pytest.raises(surgeon.PlanError, match="began without --teacher, and .*talker.* is asked for now"):
        surgeon.finetune(talker, output=tmp_path / "out", resume=True, teacher=str(talker))


def test_a_resume_where_there_is_no_run_needs_the_data(run, talker, tmp_path):
    outcome = run("finetune", talker, "--resume", "-o", tmp_path / "out")

    assert outcome.code == 2
    assert "--data" in outcome.err
    assert not (tmp_path / "out.run").exists()


def test_a_record_of_the_run_that_was_edited_is_refused(run, finished, talker, tmp_path):
    whole = json.loads((finished / "run.json").read_text())
    for name, value in {"batch_size": "3", "eval_data": [1], "workers": "2", "lr": 1}.items():
        content = {part: dict(whole[part]) for part in ("model", "settings", "others")} | {"data": whole["data"]}
        for part in ("settings", "others"):
            content[part] |= {name: value} if name in content[part] else {}
        (finished / "run.json").write_text(json.dumps(content))

        outcome = run("finetune", talker, "--resume", "-o", tmp_path / "out")
        refused(outcome, f"run.json is damaged: --{name.replace('_', '-')} cannot be")


def test_an_edited_record_of_a_run_replaces_nothing_and_trusts_nobody(run, finished, talker, tmp_path):
    """These options are never taken from a run, whatever its record says."""
    content = json.loads((finished / "run.json").read_text())
    content["others"] |= {"overwrite": True, "trust_remote_code": True, "run_dir": "elsewhere", "push_to_hub": "me/x"}
    (finished / "run.json").write_text(json.dumps(content))
    (tmp_path / "out/surgeon.json").write_text("{}")  # another result, in the place of the run's own

    refused(run("finetune", talker, "--resume", "-o", tmp_path / "out"), "exists and is not empty")
