"""What a benchmark that trains says while it does."""

from typing import Any


class Log:
    """Prints a line for each evaluation."""

    def begin(self, total_steps: int, *, done: int = 0) -> None:
        print(f"  {total_steps} steps, from {done}", flush=True)

    def step(self, report: Any) -> None:
        pass

    def evaluated(self, report: Any) -> None:
        print(f"  step {report.step}: validation {report.validation:.4f}, probe {report.probe:.4f}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def end(self) -> None:
        pass
