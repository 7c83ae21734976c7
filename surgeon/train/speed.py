"""How fast a run is: tokens a second, the floating-point operations of a token, and their share of a device's peak.

The share (MFU, model FLOPs utilisation) counts what the model needs, not what is computed twice to save memory.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import layer_kinds, text_config

# Dense bfloat16 operations a second with float32 sums, without sparsity, from the vendors' data sheets. A name that
# is not here, or a slice of a device, has no known peak, and no MFU is shown.
PEAKS: Mapping[str, float] = {
    r"A100\b": 312e12,
    r"A10$": 125e12,
    r"A30$": 165e12,
    r"A40$": 149.7e12,
    r"H100 PCIe$": 756e12,
    r"H100 NVL$": 835e12,
    r"H100 80GB HBM3$": 989e12,
    r"H200$": 989e12,
    r"B200$": 2250e12,
    r"L4$": 121e12,
    r"L40$": 181e12,
    r"L40S$": 362e12,
    r"RTX 3090$": 71e12,
    r"RTX 4090$": 165e12,
    r"MI300X\b": 1307e12,
}
# The config keys of what no family's table has to name.
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WINDOWS = ("sliding_window", "window_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
WINDOW = 30  # steps that the current speed is the mean of
_LOOKUP = re.compile(
    r"(^|[._])(embed_tokens|embed_positions|wte|wpe|word_embeddings|position_embeddings|shared)\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device in operations a second, None where it is not known."""
    if " MIG " in device_name:
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", device_name)), None)


def multiplied_parameters(anatomy: Anatomy) -> int:
    """Return how many parameters a token is multiplied with: no embedding that is only looked up, few experts of many.

    A tied embedding counts once, as the head that it also is. Without a table, both are known by their usual names.
    """
    config, tensors = text_config(anatomy.spec.config), anatomy.spec.tensors
    looked_up = [name for name in tensors if _is_lookup(anatomy, name)]
    has_head = any(_is_head(anatomy, name) for name in tensors)
    multiplied = [name for name in tensors if name not in looked_up and not _is_buffer(anatomy, name)]
    multiplied += [name for name in looked_up if not has_head and tensors[name].shape[0] == config.get("vocab_size")]
    return round(sum(tensors[name].num_parameters * _share(config, name, tensors[name].shape) for name in multiplied))


def attention_flops(anatomy: Anatomy, sequence_length: int) -> float:
    """Return the operations of one token's attention, forward, in all layers: scores and sums of values.

    4 · heads · head_dim for every key that a token sees; in a causal row of T tokens that is T / 2 on average, in a
    sliding window of W at most W. Layers without softmax attention count as 0.
    """
    config = text_config(anatomy.spec.config)
    hidden = first_of(config, HIDDEN) or 0
    heads = first_of(config, HEADS) or 0
    width = heads * config["head_dim"] if isinstance(config.get("head_dim"), int) else hidden
    window = first_of(config, WINDOWS)
    usual = "sliding_attention" if window and config.get("use_sliding_window") is not False else "full_attention"
    kinds = layer_kinds(config, anatomy.depth) or [usual] * anatomy.depth
    full = sequence_length / 2
    # the first W tokens of a row see half of W on average, the others all of it
    slid = window - window * window / (2 * sequence_length) if window and window < sequence_length else full
    keys = {"full_attention": full, "global": full, "sliding_attention": slid, "local": slid}
    return sum(4 * width * keys.get(kind, 0.0) for kind in kinds)


def flops_per_token(anatomy: Anatomy, sequence_length: int, *, trained: float = 1.0) -> float:
    """Return the operations that training on one token needs: 6 N + 6 · layers · heads · head_dim · T.

    N are the parameters that a token is multiplied with, two operations each forward, two for the gradient of what
    goes in, and two for that of the weight itself, which only the `trained` part of them has. The attention term is
    half of that in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), which counts the keys that a causal
    mask hides; 3 times `attention_flops`. T is a row's length, or a document's where rows are kept apart.
    """
    return (4 + 2 * trained) * multiplied_parameters(anatomy) + 3 * attention_flops(anatomy, sequence_length)


def first_of(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first of these keys' values that is a whole number, None where there is none."""
    return next((config[key] for key in keys if type(config.get(key)) is int), None)


def duration(seconds: float) -> str:
    """Return a time as people say it: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast it goes now."""

    tokens_per_second: float | None
    mfu: float | None  # 0 to 1
    seconds_left: float | None
    memory: int | None  # bytes, the most so far


class _Stamp(NamedTuple):
    """What was done by a time: the seconds of work, pauses left out, and the whole run's steps and tokens."""

    seconds: float
    step: int
    tokens: int


class Meter:
    """Measures the pace of a run that is told of each step; what happens in `paused` counts for the time left only."""

    def __init__(
        self,
        total_steps: int,
        *,
        done: int = 0,
        tokens: int = 0,
        flops_per_token: float | None = None,
        peak: float | None = None,
        memory: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`peak` is that of all devices together; `done` steps and `tokens` were before, in a time not known here."""
        self._total = total_steps
        self._flops, self._peak = flops_per_token, peak
        self._memory, self._clock = memory, clock
        self._paused = 0.0
        self._begin = _Stamp(clock(), done, tokens)
        self._first: _Stamp | None = None  # the end of the first step
        self._window = deque([self._begin], maxlen=WINDOW + 1)

    def step(self, step: int, tokens: int) -> Pace:
        """Know that `step` steps are done and `tokens` were read, of the whole run on all devices; return the pace."""
        now = _Stamp(self._clock() - self._paused, step, tokens)
        if self._first is None:
            self._first = now
        elif self._window[0] is self._begin:
            self._window.popleft()  # the first step compiles, allocates and reads; the others show the pace
        self._window.append(now)
        return self.pace()

    def pace(self) -> Pace:
        """Return the pace of the last steps."""
        speed = _rate(self._window[0], self._window[-1])
        return Pace(
            tokens_per_second=speed,
            mfu=speed * self._flops / self._peak if speed and self._flops and self._peak else None,
            seconds_left=self._seconds_left(speed),
            memory=self._memory(),
        )

    @property
    def average(self) -> float | None:
        """The tokens a second of all steps but the first, or of that one where it was the only one."""
        last = self._window[-1]
        return (self._first and _rate(self._first, last)) or _rate(self._begin, last)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time is not that of steps: evaluating, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def _seconds_left(self, speed: float | None) -> float | None:
        """Return the time that the steps to come need at this speed, with as many pauses as there were until now."""
        first, last = self._window[0], self._window[-1]
        if not speed:
            return None
        a_step = (last.seconds - first.seconds) / (last.step - first.step)
        pauses = self._paused / (last.step - self._begin.step)
        return max(0, self._total - last.step) * (a_step + pauses)


def peak_memory(device_type: str) -> int | None:
    """Return the most bytes that were in use at once: of a GPU by tensors, else of this process, as the system says."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if device_type == "mps":
        import torch

        return torch.mps.driver_allocated_memory()  # of now: there is no record of the most
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rate(first: _Stamp, last: _Stamp) -> float | None:
    seconds, tokens = last.seconds - first.seconds, last.tokens - first.tokens
    return tokens / seconds if seconds > 0 and tokens > 0 else None


def _is_lookup(anatomy: Anatomy, name: str) -> bool:
    if anatomy.family is None:
        return _LOOKUP.search(name) is not None
    return anatomy.row(name)[0].kind == "embedding"


def _is_head(anatomy: Anatomy, name: str) -> bool:
    if anatomy.family is None:
        return _HEAD.search(name) is not None
    return anatomy.row(name)[0].kind == "head"


def _is_buffer(anatomy: Anatomy, name: str) -> bool:
    return anatomy.family is not None and anatomy.row(name)[0].kind == "buffer"


def _share(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> float:
    """Return the part of a tensor that one token is multiplied with: 2/8 of eight experts, of most tensors all."""
    experts, chosen = first_of(config, EXPERTS), first_of(config, EXPERTS_PER_TOKEN)
    if not experts or not chosen:
        return 1.0
    is_stacked = len(shape) == 3 and shape[0] == experts
    return min(1.0, chosen / experts) if is_stacked or ".experts." in name else 1.0
