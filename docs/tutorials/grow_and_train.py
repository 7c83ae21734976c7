# %% [markdown]
# # Grow and train on
#
# A trained model gets two more layers and computes what it computed before. Then the new layers are trained. You
# need a clone of the repository and the model that `make demo` puts into `demo-output/`:
#
# ```bash
# .venv/bin/python docs/tutorials/grow_and_train.py demo-output/SmolLM2-135M
# ```
#
# It takes a few minutes on two cores.

# %%
import os
import sys
from pathlib import Path

import surgeon

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo-output/SmolLM2-135M"
STEPS = int(os.environ.get("STEPS", "30"))
OUT = Path("tutorial-output/grow-and-train")
OUT.mkdir(parents=True, exist_ok=True)
pages = sorted(Path(__file__).resolve().parents[1].glob("*.md"))  # the documentation is the text
text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
cut_at = int(0.9 * len(text))
(OUT / "train.txt").write_text(text[:cut_at], encoding="utf-8")
(OUT / "held-out.txt").write_text(text[cut_at:], encoding="utf-8")
train, held_out = str(OUT / "train.txt"), str(OUT / "held-out.txt")

# %% [markdown]
# ## Grow it
#
# New layers begin as copies whose outputs are zero, so they change nothing yet. The plan can be read before a byte
# is written: `summary` has sizes, config keys and the source layer of each layer.

# %%
depth = surgeon.inspect(MODEL).anatomy.depth
surgery = surgeon.grow(MODEL, layers=depth + 2)
print(surgery.summary())
surgery.save(OUT / "grown", overwrite=True)

# %% [markdown]
# ## Is it the same function?
#
# `verify` runs both on the same tokens, compares the logits, and checks that gradients reach the new weights: a
# layer of zeros that can never learn would be of no use.

# %%
print(surgeon.verify(MODEL, OUT / "grown"))

# %% [markdown]
# ## Train the new layers
#
# `train="new"` freezes what came from the source. `plot` draws the losses; before the first step they are the
# source's.

# %%
training = surgeon.finetune(
    OUT / "grown", data=[train], train="new", output=OUT / "trained", run_dir=OUT / "trained.run", overwrite=True,
    max_steps=STEPS, batch_size=2, sequence_length=128, lr="3e-4", eval_fraction=0.0, eval_rows=4,
)  # fmt: skip
print(training)
surgeon.plot(OUT / "trained.run", x="tokens").savefig(OUT / "loss.png")

# %%
evaluation = surgeon.evaluate(OUT / "trained", baseline=MODEL, data=[held_out], samples=8, sequence_length=128)
print(evaluation)

# %% [markdown]
# ## What so few steps show
#
# That the start is the source, that the new layers learn, and by how much the loss on this text falls. Not that
# depth was what helped: the same steps on the old layers might have done as much. [The page of grow](../grow.md)
# has longer runs with such controls.

# %%
difference = evaluation.differences["loss"]
error = "" if difference.error is None else f" ± {difference.error:.4f}"
print(f"{STEPS} steps on two new layers changed the loss by {difference.value:+.4f}{error} nats a token")
