# %% [markdown]
# # Gist a system prompt
#
# A model gets gist tokens, learns to read instructions from them, and a prompt is compressed into the states of
# four tokens, which any later call can use instead of the prompt. You need a clone of the repository and the model
# that `make demo` puts into `demo-output/`:
#
# ```bash
# .venv/bin/python docs/tutorials/gist_a_prompt.py demo-output/SmolLM2-135M
# ```
#
# It takes a few minutes on two cores.

# %%
import json
import os
import sys
from pathlib import Path

import surgeon

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo-output/SmolLM2-135M"
STEPS = int(os.environ.get("STEPS", "30"))
OUT = Path("tutorial-output/gist-a-prompt")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Gist tokens
#
# Adding them trains nothing: the new rows of the embedding are the mean of all rows.

# %%
surgeon.add_gist(MODEL, tokens=4).save(OUT / "gist", overwrite=True)

# %% [markdown]
# ## Records
#
# Instructions, each with inputs and outputs. In training, tokens after the gist cannot see the instruction: a mask
# leaves only the gist between them. So whatever the answer needs must pass through four tokens. These records are
# made here, and there are few kinds of them; a real run takes some ten thousand instructions, all different.

# %%
words = ["river", "stone", "garden", "window", "letter", "bridge", "forest", "candle", "silver", "winter"]
rules = {
    "Write the word in capital letters.": str.upper,
    "Write the word backwards.": lambda word: word[::-1],
    "Write the word twice.": lambda word: f"{word} {word}",
    "Write the first letter of the word.": lambda word: word[0],
}
records = [{"instruction": told, "input": word, "output": rule(word)} for word in words for told, rule in rules.items()]
for name, some in {"train": records[:-8], "held-out": records[-8:]}.items():
    (OUT / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some), encoding="utf-8")

# %%
training = surgeon.finetune(
    OUT / "gist", data=[str(OUT / "train.jsonl")], gist=True, output=OUT / "gisted", run_dir=OUT / "gisted.run",
    overwrite=True, max_steps=STEPS, batch_size=4, sequence_length=128, lr="2e-4", eval_fraction=0.0, eval_rows=4,
)  # fmt: skip
print(training)

# %% [markdown]
# ## Compress a prompt, and use it
#
# The compressed prompt is checked before it is written: after it, the model must compute what it computes behind
# the mask.

# %%
prompt = "Write the word in capital letters."
compression = surgeon.compress(OUT / "gisted", prompt, output=OUT / "prompt", overwrite=True)
print(compression)
print(surgeon.generate(OUT / "gisted", "river", gist=OUT / "prompt", max_new_tokens=8))

# %% [markdown]
# ## Does the gist carry the prompt?
#
# The same records with the whole prompt, with its gist, and with no prompt at all. The recovery says how much of
# the way from *none* to *full* the gist has come; there is none where the prompt itself does not help measurably.

# %%
evaluation = surgeon.evaluate_gist(OUT / "gisted", data=[str(OUT / "held-out.jsonl")], max_new_tokens=8)
print(evaluation)

# %% [markdown]
# ## What so few steps show
#
# That the pieces fit: the mask, the states, the saved prompt and the comparison. A few dozen steps on four
# instructions do not teach a model of 135 million parameters to compress. What it takes, and what came of it at
# length, is in [the page of gist](../gist.md).
