"""Training speed and memory beside a bare accelerate loop and TRL's SFTTrainer: same model, rows, batch and optimiser.

    python benchmarks/finetune.py [--rounds 3] [--rows 4] [--length 512] [--precision bf16]

Each trains a Llama of random weights (vocabulary 32,768) in a process of its own, in turns, one thread each, on the
same rows of random tokens, with AdamW at the same rate. Speed is tokens per second of CPU time over the steps after the
first two, so that other work on the machine counts little. Memory is the growth of resident memory, at its peak, since
before the model was made. It stands beside the required memory: weights, gradients and two states in float32, and the
activations, counted in the tensors that autograd keeps of the layers. Memory is measured twice: as the allocator leaves
it, and with every tensor of a megabyte returned to the system when it is freed, which is slower but shows the memory
that is really held. TRL is left out if it is not installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

KINDS = ("surgeon", "accelerate", "trl")
WARM = 2


def model_of(options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def rows_of(options):
    import torch

    number = options.rows * (options.steps + WARM)
    return torch.randint(32768, (number, options.length), generator=torch.Generator().manual_seed(0))


class Clock:
    """CPU seconds of the steps after the first ones."""

    def __init__(self):
        self.done, self.began = 0, 0.0

    def step(self):
        self.done += 1
        if self.done == WARM:
            self.began = time.process_time()

    @property
    def seconds(self):
        return time.process_time() - self.began


def arguments(options, directory):
    return {
        "output_dir": directory,
        "max_steps": options.steps + WARM,
        "per_device_train_batch_size": options.rows,
        "learning_rate": 1e-4,
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
    }


def train_surgeon(options, clock):
    import numpy as np
    from transformers import TrainerCallback

    from surgeon.train.arguments import arguments as run_arguments
    from surgeon.train.data import Collator, RowDataset, TrainingRow
    from surgeon.train.objective import Objective, attach_loss
    from surgeon.train.packing import one_per_row
    from surgeon.train.settings import Settings
    from surgeon.train.trainer import SurgeonTrainer

    class Rows(RowDataset):
        def __getitem__(self, index):
            ids = tokens[index]
            return TrainingRow(ids, np.arange(len(ids)), np.append(ids[1:], -100), np.arange(len(ids)))

    class Step(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.step()

    tokens = rows_of(options).numpy()
    data = SimpleNamespace(
        rows=Rows(None, one_per_row([options.length] * len(tokens))),
        collate=Collator(0, with_index=True),
        held_out={},
        describe=lambda batch: "random tokens",
    )
    model = model_of(options)
    attach_loss(model, Objective())
    settings = Settings(batch_size=options.rows, precision=options.precision, save_every=0, lr="1e-4")
    steps = options.steps + WARM
    with tempfile.TemporaryDirectory() as directory:
        place = {"run_dir": Path(directory), "lr": 1e-4, "steps": steps, "device": "cpu", "resumed": True}
        args = run_arguments(settings, data, **place)
        args.eval_strategy = "no"
        trainer = SurgeonTrainer(model, args, data=data, on_step=lambda logs: None, on_evaluation=lambda losses: None)
        trainer.add_callback(Step())
        trainer.train()


def train_accelerate(options, clock):
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if options.precision == "bf16" else "no")
    model, tokens = model_of(options), rows_of(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    loader = torch.utils.data.DataLoader(tokens, batch_size=options.rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def train_trl(options, clock):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import TrainerCallback
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class Step(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.step()

    tokens = rows_of(options).tolist()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.pad_token = tokenizer.eos_token = "a"
    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            **arguments(options, directory), max_length=options.length, dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = SFTTrainer(
            model_of(options), args=args, train_dataset=Dataset.from_dict({"input_ids": tokens}),
            processing_class=tokenizer, callbacks=[Step()],
        )  # fmt: skip
        trainer.train()


def required(options):
    """Return the required bytes: 16 per parameter, and the tensors that autograd keeps of the layers."""
    import torch

    model = model_of(options)
    ids = rows_of(options)[: options.rows]
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        states = model.model(input_ids=ids).last_hidden_state
    activations = sum(size for place, size in saved.items() if place not in weights)
    assert states.requires_grad
    return 16 * sum(parameter.numel() for parameter in model.parameters()) + activations


def one(kind, options):
    import resource

    import psutil
    import torch

    torch.set_num_threads(1)
    if kind == "required":
        return {"required": required(options)}
    if kind == "surgeon":
        import surgeon.train.runner  # noqa: F401
    else:
        import transformers.trainer  # noqa: F401
    before = psutil.Process().memory_info().rss
    clock = Clock()
    {"surgeon": train_surgeon, "accelerate": train_accelerate, "trl": train_trl}[kind](options, clock)
    tokens = options.rows * options.length * (clock.done - WARM)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": tokens / clock.seconds, "memory": peak - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--only", choices=(*KINDS, "required"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options)))
        return
    figures = {kind: [] for kind in (*KINDS, "required")}
    held_figures = {kind: [] for kind in KINDS}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    returning = environment | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    plan = [("required", figures, environment)]
    plan += [(kind, figures, environment) for _ in range(options.rounds) for kind in KINDS]
    for kind, into, where in [*plan, *((kind, held_figures, returning) for kind in KINDS)]:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
        ran = subprocess.run(command, env=where, capture_output=True, text=True)
        if ran.returncode:
            print(f"{kind}: {ran.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        into[kind].append(json.loads(ran.stdout.splitlines()[-1]))
        print(kind, into[kind][-1], flush=True)
    required_bytes = figures.pop("required")[0]["required"]
    print(f"required: {required_bytes / 1e6:,.0f} MB")
    for kind, runs in figures.items():
        if runs:
            speeds = [run["tokens_per_second"] for run in runs]
            own_speeds = [run["tokens_per_second"] for run in figures["surgeon"]]
            pairs = [one / other for one, other in zip(own_speeds, speeds, strict=False)]  # a run may have failed
            memory = statistics.median(run["memory"] for run in runs)
            held = held_figures[kind][0]["memory"]
            print(
                f"{kind}: {statistics.median(speeds):,.0f} tokens per CPU second; surgeon is "
                f"{statistics.median(pairs):.3f} times as fast ({min(pairs):.3f} to {max(pairs):.3f}); "
                f"{memory / 1e6:,.0f} MB, {memory / required_bytes:.2f} x required; held {held / 1e6:,.0f} MB, "
                f"{held / required_bytes:.2f} x"
            )


if __name__ == "__main__":
    main()
