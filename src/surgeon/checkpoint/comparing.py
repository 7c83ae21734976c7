"""Whether two stored tensors hold the same bytes."""

from surgeon.checkpoint.source import Source

CHUNK = 4 * 1024 * 1024
LOOKED_AT, PLACES = 65_536, 4  # bytes, and how often, of a tensor that would have to be downloaded


def are_equal(source: Source, name: str, other: Source, other_name: str) -> bool:
    """Return whether two tensors of one dtype and shape hold the same bytes.

    Of those that are not on this machine, the first and the last bytes are compared and some between.
    """
    here, there = source.tensors[name], other.tensors[other_name]
    size = here.end - here.start
    spans = [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    is_remote = any(each.transfer is not None for each in (source, other))
    if is_remote and size > LOOKED_AT * PLACES:
        starts = [(size - LOOKED_AT) * place // (PLACES - 1) for place in range(PLACES)]
        spans = [(at, at + LOOKED_AT) for at in starts]
    first = source.parts({here.file: [(here.start + at, here.start + end) for at, end in spans]})[here.file]
    second = other.parts({there.file: [(there.start + at, there.start + end) for at, end in spans]})[there.file]
    with first.opened() as one, second.opened() as two:
        for at, end in spans:
            left, right = bytearray(end - at), bytearray(end - at)
            one.read_into(left, here.start + at)
            two.read_into(right, there.start + at)
            if left != right:
                return False
    return True
