# %% [markdown]
# # Prune and heal
#
# A model loses a fifth of its layers and is trained until it has recovered some of what it lost. You need a clone
# of the repository and the model that `make demo` puts into `demo-output/`. Run this page as a script, or its cells
# in a notebook (it is in the percent format that Jupytext and VS Code open):
#
# ```bash
# .venv/bin/python docs/tutorials/prune_and_heal.py demo-output/SmolLM2-135M
# ```
#
# It takes a few minutes on two cores. `STEPS=300` in front of it trains for longer.

# %%
import os
import sys
from pathlib import Path

import surgeon

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo-output/SmolLM2-135M"
STEPS = int(os.environ.get("STEPS", "30"))
OUT = Path("tutorial-output/prune-and-heal")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The text is the documentation of surgeon: it is there, and it is not what the model was trained on. The last tenth
# is held out.

# %%
pages = sorted(Path(__file__).resolve().parents[1].glob("*.md"))
text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
cut_at = int(0.9 * len(text))
(OUT / "train.txt").write_text(text[:cut_at], encoding="utf-8")
(OUT / "held-out.txt").write_text(text[cut_at:], encoding="utf-8")
train, held_out = str(OUT / "train.txt"), str(OUT / "held-out.txt")

# %% [markdown]
# ## What is there
#
# Nothing but headers is read for this. In a notebook, `inspection` alone shows tables, and `inspection.draw()` a
# picture.

# %%
inspection = surgeon.inspect(MODEL)
print(inspection)

# %% [markdown]
# ## Which layers go
#
# The angular distance says how much a block of layers turns the state that runs through it. The block that turns it
# least goes. The model reads some text for that, layer by layer, so that memory holds one layer at a time.

# %%
pruning = surgeon.prune(MODEL, layers="80%", data=[train], samples=8, sequence_length=128)
print(pruning)
pruning.draw().savefig(OUT / "scores.png")
pruning.save(OUT / "cut", overwrite=True)

# %% [markdown]
# ## What that cost
#
# Both models read the same held-out tokens, so the difference is paired and has a small error.

# %%
shape = {"data": [held_out], "samples": 8, "sequence_length": 128}
cut = surgeon.evaluate(OUT / "cut", baseline=MODEL, **shape)
print(cut)

# %% [markdown]
# ## Heal it
#
# The cut model is trained on the text, with the whole model as its teacher: it learns the teacher's probabilities
# too, not only the next token.

# %%
training = surgeon.finetune(
    OUT / "cut", data=[train], teacher=MODEL, output=OUT / "healed", run_dir=OUT / "healed.run", overwrite=True,
    max_steps=STEPS, batch_size=2, sequence_length=128, lr="2e-4", eval_fraction=0.0, eval_rows=4,
)  # fmt: skip
print(training)
training.draw().savefig(OUT / "loss.png")

# %%
healed = surgeon.evaluate(OUT / "healed", baseline=MODEL, **shape)
print(healed)

# %% [markdown]
# ## What so few steps show
#
# How much of the gap is closed, in nats a token. A few dozen steps on a hundred kilobytes close a part of it:
# enough to see the direction, not enough for a model to use. Some of the gain is no healing at all: the model also
# learns how this documentation is written, which the whole model was never shown. For a fair picture train the
# whole model on the same text too, and compare on text of other kinds. [The recipe](../run.md) does all of this in
# one command, at length.

# %%
whole, before, after = (
    one.figures["loss"].value for one in (cut.baseline, cut.scored, healed.scored) if one is not None
)
print(f"loss on held-out text: whole {whole:.3f}, cut {before:.3f}, after {STEPS} steps {after:.3f}")
if before > whole:
    print(f"{100 * (before - after) / (before - whole):.0f} % of what the cut cost is regained")
else:
    print("the cut cost nothing on this text, so there is nothing to regain")
