"""Bytes and requests of `surgeon truncate` of a model on a Hub, on loopback, and cuts that are killed.

    python benchmarks/hub.py [--kills 20]

Makes a float32 Llama with 32 layers of 2 MB, puts it on the Hub of the tests (tests/hub_server.py), and cuts it to 4
layers: plainly, from a second host, and with every wrong answer that the server knows, at random. Each cut begins
with an empty cache, is compared with the cut from the disk, and prints a line. With --kills so many cuts are killed
with SIGKILL at random moments; after each the store is compared with its map, block by block, and the last cut with
the one from the disk.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import surgeon

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import handmade
from hub_server import FAULTS, HubServer
from killed_ranges import check_store, kill, started

FAULTY = [fault for fault in FAULTS if fault != "whole"]  # the server counts all that it sends, read or not


def published(server: HubServer, directory: Path) -> tuple[bytes, int]:
    """Return the weights of the first 4 layers, and the bytes that a cut needs: theirs and the header's."""
    sizes = {"hidden_size": 80, "intermediate_size": 2000, "num_hidden_layers": 32}
    handmade.checkpoint(directory, tensors=handmade.llama(layers=32, hidden=80, ffn=2000), **sizes)
    server.commit("org/deep", {path.name: path.read_bytes() for path in directory.iterdir()})
    done = surgeon.truncate(directory, layers=4).save(directory / "cut")
    with (directory / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return (directory / "cut/model.safetensors").read_bytes(), header + done.bytes_read


def cut_again(server: HubServer, work: Path, cut: bytes) -> None:
    """Cut once. Exits where it fails, or ends otherwise than on the disk."""
    _, error = started(server, work, work / "out").communicate()
    if error or (work / "out/model.safetensors").read_bytes() != cut:
        sys.exit(f"the cut is not that of the disk: {error}")


def forget(work: Path) -> None:
    """Empty the cache."""
    for name in ("hub", "assets"):
        shutil.rmtree(work / name, ignore_errors=True)


def measure(name: str, server: HubServer, work: Path, cut: bytes, needed: int, *, faults: Sequence[str] = ()) -> None:
    """Cut once with an empty cache and print the line."""
    forget(work)
    server.requests.clear()
    server.ranges.clear()
    server.faults[:] = faults
    began = time.perf_counter()
    cut_again(server, work, cut)
    seconds = time.perf_counter() - began
    sent, wrong = server.sent_of_weights(), sum(map(bool, faults)) - sum(map(bool, server.faults))
    print(f"| {name} | {sent / 1e6:.2f} MB | {sent / needed:.3f} | {len(server.ranges)} | {wrong} | {seconds:.2f} |")


def kill_often(server: HubServer, work: Path, cut: bytes, kills: int, chance: random.Random) -> None:
    """Kill so many cuts, compare what each leaves, and print how many there were."""
    forget(work)
    server.pause = 0.1
    killed = runs = blocks = 0
    while killed < kills:
        runs += 1
        if kill(server, work, work / "out", chance):
            killed += 1
        else:
            cut_again(server, work, cut)
            forget(work)
        blocks += check_store(work)
    server.pause = 0.0
    cut_again(server, work, cut)
    print(
        f"{killed} of {runs} cuts were killed; {blocks} blocks compared, all as their maps say; the last cut is right"
    )


def main() -> None:
    """Run everything and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="also kill so many cuts")
    kills = parser.parse_args().kills
    work, chance = Path(tempfile.mkdtemp(prefix="surgeon-benchmark-")), random.Random(0)
    try:
        with HubServer() as server:
            cut, needed = published(server, work / "model")
            size = (work / "model/model.safetensors").stat().st_size
            print(f"4 of 32 layers need {needed / 1e6:.2f} of {size / 1e6:.1f} MB")
            print("| | sent of weights | to what is needed | range requests | wrong answers | seconds |")
            print("| --- | --- | --- | --- | --- | --- |")
            measure("plain", server, work, cut, needed)
            server.use_cdn = True
            measure("second host", server, work, cut, needed)
            measure("each wrong answer once", server, work, cut, needed, faults=["", *FAULTY])
            dropping = [chance.choice(["drop", "drop", "429", "500", "", ""]) for _ in range(100)]
            measure("dropped, limited or failed: 2 of 3", server, work, cut, needed, faults=dropping)
            if kills:
                kill_often(server, work, cut, kills, chance)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
