"""Compressed prompts of toys, and generation by the mask that they must equal."""

from contextlib import contextmanager

import torch

from surgeon.gist.compress import compress_ids
from surgeon.gist.masks import gist_masks, gist_phases
from surgeon.gist.prompt import GistPrompt

PROMPT = torch.randint(3, 100, (17,), generator=torch.Generator().manual_seed(3)).tolist()
TEXTS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(4))
GIST = 130  # the toys have 131 tokens
NUM_TOKENS = 3
WRITE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def compressed(model, num_tokens=NUM_TOKENS):
    return compress_ids(model, PROMPT + [GIST] * num_tokens, num_tokens)


def prompt_of(model, num_tokens=NUM_TOKENS):
    return GistPrompt(model, compressed(model, num_tokens)[0], (GIST,) * num_tokens, {})


@contextmanager
def masked(model):
    """Let a decoder compute everything anew in each step, prompt included, under the mask of training."""

    def give(_, __, arguments):
        ids = arguments["input_ids"]
        masks = gist_masks(model.config, gist_phases(ids, [GIST]), dtype=model.dtype)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return (), arguments | {"attention_mask": masks, "position_ids": positions}

    handle = model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def written_by_mask(model, texts, num_tokens=NUM_TOKENS, **options):
    """Return what a decoder writes behind prompt, gist and text, without any cache."""
    before = torch.tensor(PROMPT + [GIST] * num_tokens).expand(len(texts), -1)
    ids = torch.cat([before, texts], 1)
    with torch.no_grad(), masked(model):
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=False, suppress_tokens=[GIST], **options
        )
    return written[:, ids.shape[1] :]
