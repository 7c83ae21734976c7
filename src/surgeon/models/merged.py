"""An adapter with its base as a temporary directory that transformers loads; weights are written when needed."""

import shutil
import tempfile
import weakref
from pathlib import Path

from surgeon.checkpoint.lora import MergedSource
from surgeon.checkpoint.output import check_space
from surgeon.checkpoint.receipt import to_bytes
from surgeon.checkpoint.source import CONFIG, spec_of
from surgeon.errors import OutputError
from surgeon.plan.execute import execute, lay_out
from surgeon.plan.plan import identity

SHARD = 5 * 10**9  # bytes


def directory_of(source: MergedSource, *, weights: bool) -> Path:
    """Return a directory with the config and the companions of a merged checkpoint, and with `weights` its weights.

    It is made once, and removed when the source is no longer used. Raises OutputError where there is no space for it.
    """
    made = vars(source)  # as cached_property does
    if "loadable" not in made:
        made["loadable"] = _begun(source)
    directory: Path = made["loadable"]
    if weights and "has_weights" not in made:
        spec = spec_of(source)
        plan = identity(spec, depth=0)
        check_space(directory, spec.nbytes)
        execute(plan, source, directory, shards=lay_out(plan, spec, source, max_shard_bytes=SHARD))
        made["has_weights"] = True
    return directory


def _begun(source: MergedSource) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="surgeon-merged-"))
    weakref.finalize(source, shutil.rmtree, directory, ignore_errors=True)
    try:
        for name in source.companions:
            place = directory / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.fetch(name), place)
        (directory / CONFIG).write_bytes(to_bytes(source.config))
    except OSError as error:
        raise OutputError(
            f"cannot write {directory}: {error.strerror}", hint="Set TMPDIR to a disk with more space."
        ) from error
    return directory
