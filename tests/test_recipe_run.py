"""Recipes that run: what is fused, skipped, resumed, refused, gated and repeated, and what they report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import talkers
from recipe_runs import InProcess, run, write

import surgeon
from surgeon.errors import OutputError, RecipeError
from surgeon.recipe.commands import StepError
from surgeon.recipe.reading import Condition, Place
from surgeon.recipe.running import figure
from surgeon.text import plus_minus

LATER = False
if LATER:
    import torch  # noqa: F401  # the steps train

CUT = """
    settings: {model: toy, layers: 4}
    steps:
      - {name: short, truncate: {model: $model, layers: $layers}}
      - {name: deep, grow: {model: short, layers: 6}}
      - {name: seen, inspect: {model: deep}}
    """
HEAL = """
    settings: {model: toy, data: text.txt, steps: 3}
    steps:
      - {name: short, truncate: {model: $model, layers: 2}}
      - name: healed
        finetune:
          {model: short, data: $data, max-steps: $steps, batch-size: 2, sequence-length: 32, lr: 1e-2, eval-fraction: 0}
      - name: judged
        evaluate: {model: healed, baseline: $model, data: $data, sequence-length: 32, samples: 2}
        require: {recovery: "> 0", differences.loss.value: "< 100"}
    """


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a directory with the checkpoint `toy` and the text `text.txt`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    talkers.talker(tmp_path / "toy")
    talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    return tmp_path


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_surgeries_fuse_into_one_pass_with_the_bytes_of_one_after_the_other(here: Path) -> None:
    commands = InProcess()

    done = run(write(here / "r.yaml", CUT), here / "out", commands)

    assert commands.ran == ["+grow", "inspect"]
    assert sorted(path.name for path in (here / "out").iterdir() if not path.name.startswith(".")) == [
        *("deep", "recipe.json", "report.html", "report.md")
    ]
    surgeon.truncate("toy", layers=4).save("one")
    surgeon.grow("one", layers=6).save("two")
    assert weights(here / "out/deep") == weights(here / "two")
    assert [(step.name, step.status) for step in done.outcomes] == [(n, "done") for n in ("short", "deep", "seen")]


def test_a_rerun_does_nothing_again_and_says_so(here: Path) -> None:
    path = write(here / "r.yaml", HEAL)
    first, again = InProcess(), InProcess()

    one = run(path, here / "out", first)
    two = run(path, here / "out", again)

    assert (first.ran, again.ran) == (["truncate", "finetune", "evaluate"], [])
    assert [step.status for step in two.outcomes] == ["skipped"] * 3
    assert [step.result for step in two.outcomes] == [step.result for step in one.outcomes]


def test_other_options_or_data_are_refused_until_they_may_replace_what_is_there(here: Path) -> None:
    path = write(here / "r.yaml", HEAL)
    run(path, here / "out")
    before = weights(here / "out/healed")

    with pytest.raises(RecipeError, match="healed was made with max-steps 3, and 4 is asked for now"):
        run(path, here / "out", settings=["steps=4"])
    talkers.written(here / "text.txt", talkers.TEXT * 5)
    with pytest.raises(RecipeError, match=r"healed was made with another data: text\.txt has changed"):
        run(path, here / "out")
    assert weights(here / "out/healed") == before

    commands = InProcess()
    run(path, here / "out", commands, overwrite=True)
    assert commands.ran == ["finetune", "evaluate"]
    assert weights(here / "out/healed") != before


def test_a_measurement_with_other_options_is_taken_again_for_nothing_is_lost(here: Path) -> None:
    path = write(here / "r.yaml", HEAL)
    run(path, here / "out")
    write(path, HEAL.replace("samples: 2", "samples: 3"))
    commands = InProcess()

    done = run(path, here / "out", commands)

    assert commands.ran == ["evaluate"]
    assert done.outcomes[-1].result["rows"] == 3


def test_a_run_from_another_directory_finds_what_is_done(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(write(here / "r.yaml", HEAL), Path("out"))
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    commands = InProcess()

    done = run(here / "r.yaml", Path("../out"), commands, settings=["model=../toy", "data=../text.txt"])

    assert commands.ran == []
    assert done.outcomes[1].output == "../out/healed"


def test_from_runs_a_step_and_those_after_it_again(here: Path) -> None:
    path = write(here / "r.yaml", HEAL)
    run(path, here / "out")
    before, commands = weights(here / "out/healed"), InProcess()

    run(path, here / "out", commands, first="healed")

    assert commands.ran == ["finetune", "evaluate"]
    assert weights(here / "out/healed") == before, "the same seed, the same bytes"
    with pytest.raises(RecipeError, match="no such step; did you mean healed"):
        run(path, here / "out", first="heald")


def test_an_output_that_is_gone_is_made_again_and_one_that_was_changed_is_not_replaced(here: Path) -> None:
    path = write(here / "r.yaml", CUT)
    run(path, here / "out")
    shutil.rmtree(here / "out/deep")
    commands = InProcess()

    run(path, here / "out", commands)

    assert commands.ran == ["+grow"]
    config = here / "out/deep/config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(RecipeError, match="has been changed since the recipe made it"):
        run(path, here / "out")


def test_a_gate_stops_with_the_figure_and_what_is_done_is_not_run_again(here: Path) -> None:
    text = CUT + '  - {name: gate, inspect: {model: deep}, require: {parameters: "> 1e12"}}\n'
    path, commands = write(here / "r.yaml", text), InProcess()

    with pytest.raises(RecipeError, match=r"gate: parameters is 131952, and > 1e\+12 is required \(.*r.yaml:7\)"):
        run(path, here / "out", commands)
    assert "Stopped: gate" in (here / "out/report.md").read_text()
    write(path, text.replace("> 1e12", "> 1e3"))
    again = InProcess()
    run(path, here / "out", again)

    assert again.ran == []


def test_a_gate_on_a_figure_that_is_not_there_names_those_that_are(here: Path) -> None:
    text = CUT + '  - {name: gate, inspect: {model: deep}, require: {parametres: "> 1"}}\n'

    with pytest.raises(RecipeError, match="there is no figure parametres in the result") as error:
        run(write(here / "r.yaml", text), here / "out")
    assert "parameters" in str(error.value.hint)


def test_a_gate_on_a_recovery_that_was_refused_says_why() -> None:
    gate = Condition(("judged", "recovery"), ">=", 80.0, Place("r.yaml", 7))
    of_gist = {"recovery": {"loss": None}, "recovery_refused": {"loss": "the prompt is worse than none"}}

    with pytest.raises(RecipeError, match=r"no figure recovery in the result \(one row has no error\)"):
        figure({"recovery": None, "recovery_refused": "one row has no error"}, ("recovery",), gate)
    with pytest.raises(RecipeError, match=r"recovery.loss.value in the result \(the prompt is worse than none\)"):
        figure(of_gist, ("recovery", "loss", "value"), gate)
    with pytest.raises(RecipeError, match=r"no figure loss in the result \(it is not known\)"):
        figure({"loss": None}, ("loss",), gate)


GROWING = """
    steps:
      - {name: cut, truncate: {model: toy, layers: 2}}
      - {name: seen, inspect: {model: cut}}
      - name: growing
        repeat:
          until: {seen.parameters: ">= 105000"}
          at-most: MOST
          steps:
            - {name: cut, grow: {model: cut, donor: toy, layers: STEP}}
            - {name: seen, inspect: {model: cut}}
    """


def test_a_loop_ends_when_its_condition_holds_and_counts_its_rounds(here: Path) -> None:
    path = write(here / "r.yaml", GROWING.replace("MOST", "3").replace("STEP", "150%"))

    done = run(path, here / "out")

    assert [step.name for step in done.outcomes] == ["cut", "seen", "cut-2", "seen-2", "cut-3", "seen-3"]
    depths = [step.result["layers"]["after"] for step in done.outcomes if step.command != "inspect"]
    assert depths == [2, 3, 5]
    assert done.outcomes[-1].result["parameters"] >= 105_000 > done.outcomes[-3].result["parameters"]
    again = InProcess()
    run(path, here / "out", again)
    assert again.ran == []


def test_a_loop_that_does_not_get_there_ends_after_its_rounds(here: Path) -> None:
    path = write(here / "r.yaml", GROWING.replace("MOST", "1").replace("STEP", "3"))

    done = run(path, here / "out")

    assert [step.name for step in done.outcomes] == ["cut", "seen", "cut-2", "seen-2"]


def test_a_loop_with_seeds_reports_the_mean_over_them(here: Path) -> None:
    text = """
        steps:
          - name: drawn
            repeat:
              with: {seed: [2, 3], parts: [mlp]}
              steps:
                - {name: cut, truncate: {model: toy, layers: 2, inherit: $parts, seed: $seed}}
                - {name: judged, evaluate: {model: cut, data: text.txt, sequence-length: 32, samples: 2}}
        """

    done = run(write(here / "r.yaml", text), here / "out")

    assert [step.name for step in done.outcomes] == ["cut-2-mlp", "judged-2-mlp", "cut-3-mlp", "judged-3-mlp"]
    page = (here / "out/report.md").read_text()
    losses = [step.result["loss"] for step in done.outcomes if step.command == "evaluate"]
    error = abs(losses[0] - losses[1]) / 2
    assert f"| judged-mlp | loss | {plus_minus(sum(losses) / 2, error)} | 2 |" in page


def test_a_loop_over_a_setting_ranks_its_values_at_each_measurement(here: Path) -> None:
    text = """
        steps:
          - name: depths
            repeat:
              with: {layers: [1, 3, 2]}
              steps:
                - {name: cut, truncate: {model: toy, layers: $layers}}
                - {name: before, evaluate: {model: cut, data: text.txt, sequence-length: 32, samples: 2}}
                - {name: after, evaluate: {model: cut, data: text.txt, sequence-length: 16, samples: 4}}
        """

    done = run(write(here / "r.yaml", text), here / "out")

    page = (here / "out/report.md").read_text()
    found = {step.name: step.result["perplexity"] for step in done.outcomes if step.command == "evaluate"}
    for layers in "132":
        places = []
        for stem in ("before", "after"):
            best = sorted(value for name, value in found.items() if name.startswith(stem))
            places.append(best.index(found[f"{stem}-{layers}"]) + 1)
        assert re.search(rf"\| {layers} \| {places[0]} \([^|]*\) \| {places[1]} \([^|]*\) \|", page)
    assert "| before, perplexity | after, perplexity |" in page


def test_the_report_holds_the_figures_the_pictures_and_what_was_lost(here: Path) -> None:
    done = run(write(here / "r.yaml", HEAL), here / "out")

    page = (here / "out/report.html").read_text()
    for expected in ("surgeon truncate toy --layers=2", "data:image/png;base64,", "recovery", "Losses of the runs"):
        assert expected in page
    assert 'src="http' not in page, "the page needs no other file"
    text = done.to_text()
    assert "% of the parameters" in text
    assert str(here / "out/report.html") in text


def test_a_step_that_fails_keeps_those_before_it(here: Path) -> None:
    text = CUT + "  - {name: bad, evaluate: {model: deep, data: empty.txt}}\n"
    (here / "empty.txt").touch()
    path = write(here / "r.yaml", text)

    with pytest.raises(StepError, match="0 documents|no text|empty"):
        run(path, here / "out")
    record = json.loads((here / "out/recipe.json").read_text())
    assert {name: step["status"] for name, step in record["steps"].items()} == {
        "short": "done",
        "deep": "done",
        "seen": "done",
        "bad": "begun",
    }


def test_a_failed_step_is_told_and_may_be_corrected(here: Path, run_surgeon) -> None:
    (here / "empty.txt").touch()
    path = write(
        here / "r.yaml", CUT + "  - {name: bad, evaluate: {model: deep, data: empty.txt, sequence-length: 32}}\n"
    )

    failed = run_surgeon("run", path, "-o", "out", "--json", "-q")
    talkers.written(here / "empty.txt", talkers.TEXT * 4)
    corrected = run_surgeon("run", path, "-o", "out", "--json", "-q")

    assert [(step["name"], step["status"]) for step in json.loads(failed.out)["steps"]] == [
        *(("short", "done"), ("deep", "done"), ("seen", "done"), ("bad", "failed"))
    ]
    assert failed.code == 1
    assert (corrected.code, json.loads(corrected.out)["steps"][-1]["status"]) == (0, "done")


def test_what_the_recipe_did_not_make_is_never_replaced_or_removed(here: Path) -> None:
    path = write(here / "r.yaml", CUT)
    run(path, here / "out")
    for name in ("cut", "seen"):
        shutil.copytree(here / "toy", here / f"out/{name}")
    (here / "out/deep.notes.txt").touch()
    more = write(here / "more.yaml", CUT + "  - {name: cut, truncate: {model: deep, layers: 2}}\n")

    for _ in range(2):
        with pytest.raises(RecipeError, match=r"out/cut exists, and this recipe did not make it"):
            run(more, here / "out")
    run(path, here / "out", first="short")

    assert weights(here / "out/cut") == weights(here / "out/seen") == weights(here / "toy")
    assert (here / "out/deep.notes.txt").exists()


def test_a_change_anywhere_in_what_was_read_is_seen(here: Path) -> None:
    text = "steps: [{name: judged, evaluate: {model: toy, data: text.txt, sequence-length: 32, samples: 2}}]"
    path = write(here / "r.yaml", text)
    run(path, here / "out")
    file = here / "toy/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1  # deep inside the last tensor
    file.write_bytes(content)
    one, two, three = InProcess(), InProcess(), InProcess()

    run(path, here / "out", one)
    tokenizer = here / "toy/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    run(path, here / "out", two)
    run(path, here / "out", three)

    assert (one.ran, two.ran, three.ran) == (["evaluate"], ["evaluate"], [])


def test_a_name_that_is_a_step_and_a_path_is_refused(here: Path) -> None:
    shutil.copytree(here / "toy", here / "short")
    text = """
        settings: {model: null}
        steps:
          - {name: short, truncate: {model: $model, layers: 2}}
          - {name: judged, evaluate: {model: short, baseline: $model, data: text.txt}}
        """

    with pytest.raises(RecipeError, match="model of judged is short: a step's name, and a path"):
        run(write(here / "r.yaml", text), here / "out", settings=["model=short"])


def test_each_round_has_a_picture_of_its_own(here: Path) -> None:
    text = """
        steps:
          - name: rounds
            repeat:
              with: {layers: [4, 5]}
              steps:
                - name: cut
                  prune: {model: toy, layers: $layers, score: magnitude, protect: [0, 0], plot: s.png}
        """

    done = run(write(here / "r.yaml", text), here / "out")

    assert [step.result["pictures"] for step in done.outcomes] == [
        *([str(here / "out/s-4.png")], [str(here / "out/s-5.png")])
    ]


def test_a_finished_recipe_needs_no_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(here / "r.yaml", CUT)
    run(path, here / "out")
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=1000))

    assert [step.status for step in run(path, here / "out").outcomes] == ["skipped"] * 3


def test_a_model_whose_name_looks_like_an_option_is_a_model(here: Path, run_surgeon) -> None:
    shutil.copytree(here / "toy", here / "-toy")
    text = "steps: [{name: a, truncate: {model: -toy, layers: 2}}, {name: b, inspect: {model: a}}]"

    found = run_surgeon("run", write(here / "r.yaml", text), "-o", "out", "-q")

    assert found.code == 0, found.err


def test_an_impossible_surgery_is_refused_before_anything_runs(here: Path) -> None:
    text = """
        steps:
          - {name: short, truncate: {model: toy, layers: 2}}
          - {name: seen, inspect: {model: short}}
          - {name: deep, truncate: {model: short, layers: 3}}
        """
    commands = InProcess()

    with pytest.raises(RecipeError, match=r"r\.yaml:5: deep: cannot truncate to 3 layers: the model has 2"):
        run(write(here / "r.yaml", text), here / "out", commands)
    assert commands.ran == []


def test_a_disk_that_is_too_small_for_all_steps_is_refused_before_anything_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=300_000))
    commands = InProcess()

    with pytest.raises(OutputError, match="300 kB free, and the recipe needs"):
        run(write(here / "r.yaml", CUT), here / "out", commands)
    assert commands.ran == []


def test_a_directory_with_other_things_or_a_damaged_record_is_refused(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out/mine.txt").touch()
    path = write(here / "r.yaml", CUT)

    with pytest.raises(OutputError, match="not empty, and holds no recipe's results"):
        run(path, here / "out")
    for damaged in ("", "[]", '{"steps": {"short": {"key": 3}}}', '{"steps": {}, "files": 3}'):
        (here / "out/recipe.json").write_text(damaged)
        with pytest.raises(OutputError, match=r"recipe\.json"):
            run(path, here / "out")


def test_a_dry_run_plans_every_step_and_writes_nothing(here: Path) -> None:
    done = run(write(here / "r.yaml", HEAL), here / "out", dry_run=True)

    assert not (here / "out").exists()
    short, healed, judged = (step.to_dict() for step in done.outcomes)
    assert short["result"]["layers"] == {"before": 6, "after": 2}
    assert healed["result"]["steps"] == 3
    assert healed["result"]["parameters"] == short["result"]["parameters"]["after"]
    assert healed["seconds"] is not None
    assert judged["result"] == {}
    assert "at least" in done.to_text()


@pytest.fixture
def run_surgeon(here: Path, request: pytest.FixtureRequest):
    """Return the fixture `run`, whose name the function for recipes has here."""
    return request.getfixturevalue("run")


def test_a_dry_run_plans_the_first_round_of_a_loop_on_what_that_makes(here: Path) -> None:
    text = """
        steps:
          - {name: cut, truncate: {model: toy, layers: 2}}
          - {name: healed, finetune: {model: cut, data: text.txt, max-steps: 1, sequence-length: 32}}
          - name: growing
            repeat:
              until: {healed.train_loss: "<= 0"}
              at-most: 2
              steps:
                - {name: cut, grow: {model: cut, donor: toy, layers: +1}}
                - {name: healed, finetune: {model: cut, data: text.txt, max-steps: 1, sequence-length: 32}}
        """

    done = run(write(here / "r.yaml", text), here / "out", dry_run=True)

    cut, healed, grown, again = (step.to_dict() for step in done.outcomes)
    assert healed["result"]["parameters"] == cut["result"]["parameters"]["after"]
    assert (
        again["result"]["parameters"] == grown["result"]["parameters"]["after"] > cut["result"]["parameters"]["after"]
    )
    assert [step["rounds"] for step in (cut, healed, grown, again)] == [1, 1, 2, 2]


# --- the processes ------------------------------------------------------------------------------------------------


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "surgeon", "run", str(path), "-o", "out", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path: Path, text: str = "") -> None:
    until = time.monotonic() + 120
    while not path.exists() or (text and text not in path.read_text()):
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)


def test_a_run_that_is_killed_takes_its_step_along_and_the_next_one_resumes_it(here: Path) -> None:
    path = write(here / "r.yaml", HEAL.replace("max-steps: $steps", "max-steps: 12, save-every: 1"))
    run(path, here / "whole")
    first = start(path)
    wait_for(here / "out/healed.run/checkpoint-2")
    os.kill(first.pid, signal.SIGKILL)
    assert first.stderr is not None
    first.stderr.read()  # its end comes when the step, which has it too, is gone

    second = start(path, "--json")
    out, err = second.communicate(timeout=300)

    assert second.returncode == 0, err
    told = json.loads(out)
    assert [(step["name"], step["status"]) for step in told["steps"]] == [
        *(("short", "skipped"), ("healed", "done"), ("judged", "done"))
    ]
    assert told["report"] == "out/report.html"
    assert weights(here / "out/healed") == weights(here / "whole/healed")


def test_sigterm_lets_the_step_write_a_checkpoint_and_exits_as_it_does(here: Path) -> None:
    path = write(here / "r.yaml", HEAL.replace("max-steps: $steps", "max-steps: 4000"))
    process = start(path)
    wait_for(here / "out/healed.run/metrics.jsonl", '"loss"')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 143, err
    assert list((here / "out/healed.run").glob("checkpoint-*"))
    assert "the same command continues" in err


# --- replay -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_made_again_from_its_receipt_byte_for_byte(here: Path, run) -> None:
    few = {"data": ["text.txt"], "samples": 2, "sequence_length": 32}
    recipes = {
        "cut": lambda: surgeon.truncate("toy", layers=4),
        "half": lambda: surgeon.truncate("toy", layers=2, inherit=["attention"], seed=3),
        "wide": lambda: surgeon.grow("toy", layers=8, hidden_size=160, seed=5),
        "more": lambda: surgeon.grow(surgeon.truncate("toy", layers=3), layers=5, donor="toy"),
        "chain": lambda: surgeon.add_gist(surgeon.truncate("toy", layers=4), tokens=2),
        "less": lambda: surgeon.prune("toy", layers=4, intermediate_size=40, **few),
        "new": lambda: surgeon.init("gpt2", set=["n_layer=2", "n_embd=32", "n_head=4"], tokenizer="bytes", seed=4),
        "seeded": lambda: surgeon.prune("toy", layers=4, attention_heads=4, score="random", seed=7),
    }
    for name, make in recipes.items():
        make().save(name, max_shard_size="200KB")

        result = run("run", f"{name}/surgeon.json", "--json")

        assert result.code == 0, (name, result.err)
        assert json.loads(result.out)["steps"][0]["result"] == {"original": name, "same": True, "differing": []}, name


def test_a_training_is_run_again_from_its_receipt(here: Path) -> None:
    from surgeon.recipe.replay import replay

    options = {"max_steps": 3, "batch_size": 2, "sequence_length": 32, "freeze": "embeddings", "lr": "1e-2"}
    surgeon.finetune("toy", data=["text.txt"], output="healed", **options)

    def again():
        return replay(Path("healed/surgeon.json"), None, InProcess(), lambda text: None, overwrite=True, dry_run=False)

    assert again().differing == ()
    talkers.written(here / "text.txt", talkers.TEXT * 5)
    with pytest.raises(RecipeError, match=r"its data text\.txt has changed since"):
        again()
    (here / "text.txt").unlink()
    with pytest.raises(RecipeError, match="its data is gone"):
        again()


def test_a_receipt_gives_a_training_its_settings_and_no_other_option(here: Path) -> None:
    from surgeon.recipe.replay import replay

    options = {"max_steps": 1, "batch_size": 2, "sequence_length": 32, "lr": "1e-2"}
    surgeon.finetune("toy", data=["text.txt"], output="healed", **options)
    shutil.copytree("toy", "victim")
    file = Path("healed/surgeon.json")
    receipt = json.loads(file.read_text())
    receipt["steps"][0]["finetune"]["settings"] |= {"output": "victim", "overwrite": True, "run_dir": "elsewhere"}
    file.write_text(json.dumps(receipt))

    done = replay(file, Path("again"), InProcess(), lambda text: None, overwrite=False, dry_run=False)

    assert done.output == Path("again")
    assert done.differing == ()
    assert weights(Path("victim")) == weights(Path("toy"))
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    "damage",
    [
        *({"options": 3}, {"steps": [{}]}, {"steps": [{"finetune": {}}]}, {"steps": [{"prune": {}}]}, {"source": {}}),
        *({"steps": [{"finetune": {}}, {"truncate": {}}]}, {"steps": [{"truncate": {"layers": "many"}}]}),
    ],
)
def test_a_damaged_receipt_is_one_sentence(damage: dict, here: Path, run) -> None:
    surgeon.truncate("toy", layers=4).save("cut")
    file = here / "cut/surgeon.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))

    found = run("run", file, "-o", "again")

    assert found.code == 1
    assert found.err.splitlines()[-2].startswith("error: ")
    assert "bug in surgeon" not in found.err
    assert not (here / "again").exists()


def test_a_dry_run_of_a_replay_compares_nothing(here: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    surgeon.truncate("toy", layers=4).save("cut")
    monkeypatch.chdir(here / "cut")

    found = run("run", "surgeon.json", "--dry-run")

    assert (found.code, "the same bytes" in found.out) == (0, False)
    assert f"{here / 'cut-replay'} (not written)" in found.out
    assert not (here / "cut-replay").exists()


def test_what_cannot_be_replayed_is_named(here: Path, run) -> None:
    surgeon.truncate("toy", layers=4).save("cut")
    surgeon.truncate("cut", layers=2).save("short")
    shutil.rmtree("cut")
    surgeon.truncate("toy", layers=4, inherit=["mlp"]).save("cut")

    changed = run("run", "short/surgeon.json")
    shutil.rmtree("cut")
    gone = run("run", "short/surgeon.json")
    wrong = run("run", "short/surgeon.json", "--set", "a=b")
    same = run("run", "short/surgeon.json", "-o", "short", "--overwrite")
    (here / "short/surgeon.json").write_text("{}")
    none = run("run", "short/surgeon.json")

    assert "cut has changed since" in changed.err
    assert "cut is gone" in gone.err
    assert "a receipt has no settings" in wrong.err
    assert "short is what is to be compared with" in same.err
    assert "is no receipt of a surgery" in none.err
    assert {each.code for each in (changed, gone, wrong, same, none)} == {1}
