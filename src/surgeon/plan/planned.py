"""The result of a plan as a source that is not written: what is read of it is computed then."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgeon.checkpoint.derived import DerivedSource
from surgeon.checkpoint.header import FilePart
from surgeon.checkpoint.source import Ranges, Source, StoredTensor, Transfer, ranges_by_file, spec_of
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan, reads

PLANNED = "planned:"  # no file of a model has a colon in its name


@dataclass(frozen=True)
class PlannedSource(DerivedSource):
    """`base` as `plan` makes it. A tensor that only moves is read where the base has it.

    The others are computed when they are asked for, into a file without a name, which lasts as long as its parts are
    used. So a model that is narrower can be run layer by layer, and is never on the disk as a whole.
    """

    plan: Plan

    prefix = PLANNED

    @property
    def other(self) -> Source:
        return self.base

    @property
    def config(self) -> Mapping[str, Any]:
        return self.plan.config

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        specs = self.plan.result(spec_of(self.base)).tensors
        return {
            name: self.base.tensors[expr.name]
            if isinstance(expr, Read)
            else StoredTensor(specs[name], PLANNED + name, 0, specs[name].nbytes)
            for name, expr in self.plan.tensors.items()
        }

    def fetch(self, file: str) -> Path:
        return self.base.fetch(file)

    def parts(self, wanted: Ranges, *, among: Ranges | None = None) -> dict[str, FilePart]:
        computed, own = self._split(wanted)
        parts = self.base.parts(own, among=self._read(among) if among else None) if own else {}
        if not computed:
            return parts
        from surgeon.plan.arithmetic import Arithmetic, single_threaded

        arithmetic = Arithmetic(
            self.base.tensors, self.base.parts(self._read({PLANNED + name: () for name in computed}))
        )
        made: dict[str, FilePart] = {}
        with single_threaded():
            for name in computed:
                held = tempfile.TemporaryFile()  # noqa: SIM115  # the part closes it
                for part in arithmetic.parts(self.plan.tensors[name]):
                    for block in part.make():
                        held.write(block)
                held.flush()
                made[PLANNED + name] = FilePart(Path(PLANNED + name), ((0, os.fstat(held.fileno()).st_size),), held)
        return parts | made

    def missing(self, wanted: Ranges) -> int | None:
        return self.base.missing(self._read(wanted))

    @property
    def transfer(self) -> Transfer | None:
        return self.base.transfer

    def at_hand(self, file: str) -> Path | None:
        return None if file.startswith(PLANNED) else self.base.at_hand(file)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def _read(self, wanted: Ranges) -> Ranges:
        """Return the ranges of the base's files that are read for these."""
        computed, own = self._split(wanted)
        names = {read for name in computed for read in reads(self.plan.tensors[name])}
        ranges = {file: list(spans) for file, spans in own.items()}
        for file, spans in ranges_by_file(self.base.tensors, names).items():
            ranges[file] = sorted({*ranges.get(file, ()), *spans})
        return ranges
