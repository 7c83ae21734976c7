"""Trace a child among candidates: claims, then each candidate down to its layers, then the nearest ones closely."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.source import Source
from surgeon.errors import CheckpointError
from surgeon.lineage.claims import Claim, claims_of, digests, names_model
from surgeon.lineage.comparing import Comparison, Model, begin, confirm, finish, layers_to_look_at, look_at
from surgeon.lineage.mixture import Mixture, mixture_of
from surgeon.lineage.record import Link, Trace, part_words, told_of
from surgeon.lineage.samples import Samples
from surgeon.lineage.verdict import changes, direction, structure
from surgeon.progress import stage

CONFIRMED, FINISHED = 5, 3  # candidates of which rows are read, and of which tensors are compared
TIED = 1.02  # distances within this factor are one: a model and its cut are equally far from what was made of the cut
CLOSER, APART = 0.1, 2e-3  # a layer is another candidate's where that is this much closer, and the nearest is not equal
MOST_LINKS = 8


@dataclass(frozen=True)
class How:
    """The options that decide a trace: permutations of the test, their seed, and whether it ends with the layers."""

    permutations: int
    seed: int
    quick: bool = False


def traced(child: Source, candidates: Sequence[Source], how: How) -> Trace:
    """Return the lineage of a child. Raises CheckpointError for a checkpoint that cannot be compared."""
    claims = claims_of(child)
    model = Model(Samples.of(child))
    found = []
    with stage("comparing", len(candidates), "candidates") as count:
        for source in candidates:
            parent = Model(Samples.of(source))
            found.append(begin(model, parent, permutations=how.permutations, seed=how.seed))
            count(1)
    related = _confirmed(found, how)
    if not related:
        return _unrelated(model, found, claims, how)
    with stage("comparing tensors"):
        looked_at = layers_to_look_at(related[0])
        for each in () if how.quick else related[:FINISHED]:
            finish(each, looked_at)
    nearest = _nearest(related[:FINISHED])
    owners = _owners(nearest, related)
    owned = [owner is None or owner is nearest for owner in owners]
    mixture = None if how.quick else _mixture(nearest, related[:FINISHED])
    if mixture is not None and mixture.is_sliced and not all(owned):
        mixture = None  # whole layers of each
    if mixture is not None:
        owners, owned = [owner and nearest for owner in owners], [True] * len(owned)
    elif not how.quick and not all(owned):
        _look_at_own(nearest, owned)
    words = structure(nearest, owned) + ([] if all(owned) else ["layers of several models"])
    if not how.quick:
        words += ["mixture"] if mixture is not None else changes(nearest, owned)
        words = words or ["identical"]
    agreements, disagreements = _held_against(claims, nearest, related)
    if _are_one(child, nearest.parent.samples.source):
        agreements.append("the weight files have the same SHA-256")
    chain = _chain(nearest, related, how) if mixture is None and all(owned) else []
    return Trace(
        **_about(model, found, claims, how),
        nearest=nearest.parent.label,
        layers=tuple(layer if own else None for layer, own in zip(nearest.layers, owned, strict=True)),
        axes=nearest.axes,
        looks_like=tuple(words),
        p=nearest.p,
        depth=len(nearest.parent.roles.layers),
        layer_sources=tuple(None if owner is None else owner.parent.label for owner in owners),
        axis_words={axis: each.words() for axis, each in nearest.maps.items()},
        parts=part_words(nearest, owned),
        mixture=mixture,
        direction=direction(nearest, words),
        chain=tuple(chain),
        agreements=tuple(agreements),
        disagreements=tuple(disagreements),
    )


def _unrelated(model: Model, found: Sequence[Comparison], claims: Sequence[Claim], how: How) -> Trace:
    named = [
        f"{claim.file} names {each.parent.label}, and the weights have nothing to do with it"
        for claim in claims
        for each in found
        if names_model(claim, each.parent.samples.source)
    ]
    depth = len(model.roles.layers)
    return Trace(
        **_about(model, found, claims, how),
        nearest=None,
        layers=(None,) * depth,
        axes={},
        looks_like=(),
        p=min(1.0, len(found) * min((each.p for each in found), default=1.0)),  # the least of several (Bonferroni)
        depth=0,
        layer_sources=(None,) * depth,
        disagreements=tuple(named),
    )


def _about(model: Model, found: Sequence[Comparison], claims: Sequence[Claim], how: How) -> dict[str, Any]:
    """Return what a trace says whatever was found: of the candidates, the claims, and what was read."""
    all_read = [model.samples, *(each.parent.samples for each in found)]
    transfers = [samples.source.transfer for samples in all_read]
    downloaded = [transfer.nbytes for transfer in transfers if transfer is not None]
    return {
        "child": model.label,
        "candidates": {each.parent.label: told_of(each) for each in found},
        "claims": tuple(claims),
        "permutations": how.permutations,
        "bytes_read": sum(samples.bytes_read for samples in all_read),
        "requests": sum(samples.requests for samples in all_read),
        "child_bytes": model.samples.anatomy.spec.nbytes,
        "bytes_downloaded": sum(downloaded) if downloaded else None,
    }


# Which candidate is nearest


def _confirmed(found: Sequence[Comparison], how: How) -> list[Comparison]:
    """Return the candidates that have to do with the child, the closest first; of a few the rows are looked at too."""
    related = sorted((each for each in found if each.is_related), key=_closeness)
    for each in () if how.quick else related[:CONFIRMED]:
        if each.rows is None:
            confirm(each, permutations=how.permutations, seed=how.seed)
    return sorted((each for each in related if each.is_related), key=_closeness)


def _row_distance(found: Comparison) -> float:
    """Return the mean relative distance of the rows of the layers that were found, 1 where none was compared."""
    if found.rows is None:
        return 1.0
    gaps = [found.rows.distance[j, i] for j, i in enumerate(found.layers) if i is not None]
    finite = [float(gap) for gap in gaps if np.isfinite(gap)]
    return float(np.mean(finite)) if finite else 1.0


def _size_apart(found: Comparison) -> int:
    return abs(found.child.samples.anatomy.spec.num_parameters - found.parent.samples.anatomy.spec.num_parameters)


def _closeness(found: Comparison) -> tuple[float, float, float, int]:
    gains = 0.0 if found.gains is None else -found.gains.statistic
    return -found.num_layers, _row_distance(found), gains, _size_apart(found)


def _nearest(related: Sequence[Comparison]) -> Comparison:
    """Return the candidate with most of the child's layers; of those the closest, and of equals the one of its size."""
    most = max(each.num_layers for each in related)
    whole = [each for each in related if each.num_layers == most]
    distances = [_row_distance(each) if not each.differences else each.distance for each in whole]
    least = min(distances)
    tied = [each for each, distance in zip(whole, distances, strict=True) if distance <= TIED * least + 1e-7]
    return min(tied, key=lambda each: (_size_apart(each), 0.0 if each.gains is None else -each.gains.statistic))


def _owners(nearest: Comparison, related: Sequence[Comparison]) -> list[Comparison | None]:
    """Return the candidate that each of the child's layers is from: another than the nearest where it is far closer."""
    owners: list[Comparison | None] = []
    for j in range(len(nearest.layers)):
        own = _gap(nearest, j)
        others = [each for each in related if each is not nearest]
        best = min(others, key=lambda each: _gap(each, j), default=None)
        gap = np.inf if best is None else _gap(best, j)
        if np.isinf(own) and np.isinf(gap):
            owners.append(nearest if nearest.layers[j] is not None else None)
        elif best is not None and own > APART and gap < CLOSER * own:
            owners.append(best)
        else:
            owners.append(nearest)
    return owners


def _gap(found: Comparison, layer: int) -> float:
    place = found.layers[layer]
    return np.inf if place is None or found.rows is None else float(found.rows.distance[layer, place])


def _look_at_own(nearest: Comparison, owned: Sequence[bool]) -> None:
    """Compare tensors of layers that are the nearest candidate's own, where only others' were looked at."""
    own = [layer for layer, is_own in enumerate(owned) if is_own and nearest.layers[layer] is not None]
    if not any(layer in nearest.layer_maps for layer in own):
        look_at(nearest, own[:1] + own[-1:])


def _mixture(nearest: Comparison, related: Sequence[Comparison]) -> Mixture | None:
    """Return the mixture of the candidates whose layers are all the child's own, in their places."""
    same = [each for each in related if each.layers == nearest.layers and each.hidden is not None]
    same = [nearest, *(each for each in same if each is not nearest)]
    if len(same) < 2:
        return None
    keys = [key for key in nearest.blocks if all(key in each.blocks for each in same)]
    blocks = [(nearest.blocks[key].child, [each.blocks[key].parent for each in same]) for key in keys]
    blocks = [(child, parents) for child, parents in blocks if all(each.shape == child.shape for each in parents)]
    if not blocks:
        return None
    return mixture_of([each.parent.label for each in same], blocks, nearest.blocks[keys[0]].child_dtype)


# Further back, and claims


def _chain(nearest: Comparison, related: Sequence[Comparison], how: How) -> list[Link]:
    """Return the steps further back: the nearest candidate held against the other related ones, and so on."""
    links: list[Link] = []
    model, layers = nearest.parent, list(nearest.layers)
    rest = [each.parent for each in related if each is not nearest]
    while rest and len(links) < MOST_LINKS:
        compared = [begin(model, other, permutations=how.permutations, seed=how.seed) for other in rest]
        compared = _confirmed(compared, how)
        whole = [each for each in compared if each.num_layers == len(each.layers)]
        if not whole:
            return links
        best = min(whole, key=_closeness)
        layers = [None if layer is None else best.layers[layer] for layer in layers]
        links.append(Link(model.label, best.parent.label, tuple(best.layers), tuple(layers)))
        model = best.parent
        rest = [each for each in rest if each is not model]
    return links


def _held_against(
    claims: Sequence[Claim], nearest: Comparison, related: Sequence[Comparison]
) -> tuple[list[str], list[str]]:
    """Return which claims the weights agree with, and which not."""
    agreements, disagreements = [], []
    for claim in (claim for claim in claims if claim.models):
        named = [each for each in related if names_model(claim, each.parent.samples.source)]
        if not named:
            continue
        found = nearest if nearest in named else named[0]
        if claim.layer_map is None:
            related_too = "" if found is nearest else f", though {nearest.parent.label} is nearer"
            agreements.append(f"{claim.file} names {found.parent.label}, which is related{related_too}")
            continue
        wrong = _wrong_layers(claim.layer_map, found)
        if wrong is None:
            agreements.append(f"{claim.file}: the layers are those that it says")
        else:
            disagreements.append(f"{claim.file}, with the weights, {wrong}")
    return agreements, disagreements


def _wrong_layers(claimed: Sequence[int | None], found: Comparison) -> str | None:
    """Return where a receipt's layers are not those of the weights; a layer that it calls new may be a copy."""
    depth = found.parent.roles.anatomy.depth
    layers = found.layers[: found.child.roles.anatomy.depth]
    if len(claimed) != len(layers):
        return f"in the number of layers: it says {len(claimed)}, and there are {len(layers)}"
    for j, (says, is_there) in enumerate(zip(claimed, layers, strict=True)):
        if says is not None and is_there is not None and says != is_there:
            return f"at layer {j}: it says layer {says} of {depth}, and the weights are those of layer {is_there}"
    return None


def _are_one(child: Source, other: Source) -> bool:
    one, two = digests(child), digests(other)
    return bool(one) and one == two


# Candidates that nobody named


def claimed_candidates(child: Source) -> list[str]:
    """Return the models that the child's own files name and that can be opened: directories, and ids on the Hub.

    Raises CheckpointError where there is none.
    """
    names = [name for claim in claims_of(child) for name in claim.models]
    here = [
        name
        for name in dict.fromkeys(names)
        if os.path.isdir(name)  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        or (name.count("/") == 1 and not name.startswith((".", "/")))
    ]
    if not here:
        raise CheckpointError(
            f"{child.label} does not say what it was made from",
            hint="Name the models that it may come from: --candidates A --candidates B.",
        )
    return here
