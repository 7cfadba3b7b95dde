"""Checks the nodes of a job before the expensive part: slurm/preflight.sh runs
`python -m dsvae.parallel.preflight` once per rank.

Every rank checks that its GPU exists and is empty, that output_dir can be written to,
is the same on all nodes, and has space. Then all ranks meet, each sends to each, an
all-reduce must give the right sum, and all must have the same versions. Every fault is
one line on stdout,

    preflight: BAD NODE: what

and the exit code is EXIT_PREFLIGHT. Every check has a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dsvae.errors import EXIT_PREFLIGHT, first_line

PACKAGES = ("torch", "transformers", "deepspeed", "datasets")
LOCAL_SECONDS = 30.0
"""Time limit of a check of this node alone: a dead network file system hangs instead of
failing."""
EMPTY = 0.9
"""Share of a GPU's memory that must be free."""
MEBIBYTES = 16
"""Size of the all-reduce, in float32."""


class Failed(Exception):
    """Something is wrong, and the message says what. A line `NODE<tab>what` blames
    another node than this rank's."""


class Unavailable(Exception):
    """This rank leaves because of a fault that another one has named."""


def main(argv: Sequence[str] | None = None) -> int:
    """Checks this rank; returns 0 or EXIT_PREFLIGHT. Reads RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = partial(parser.add_argument, required=True)
    add("--output_dir", type=Path, help="where the run will write")
    add("--nodes", help="the nodes' names in the order of the ranks, separated by commas")
    add("--seconds", type=float, help="longest time to meet, and for a collective operation")
    add("--min_free_gb", type=float, help="free disk space at output_dir, in GB")
    options = parser.parse_args(argv)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    rank, local_rank, size = (int(os.environ[name]) for name in names)
    hosts = options.nodes.split(",")
    # Block distribution, with equally many ranks per node.
    nodes = [hosts[each * len(hosts) // size] for each in range(size)]
    meeting = Meeting(rank, nodes, options.output_dir)
    reports: list[str] = []
    problems = 0

    def check(what: str, function: Callable[[], str], seconds: float = LOCAL_SECONDS) -> bool:
        """Returns whether a check succeeds; prints what is wrong."""
        nonlocal problems
        try:
            reports.append(within(seconds, what, function))
            return True
        except Unavailable as error:
            print(f"preflight: rank {rank} on {nodes[rank]}: {error}", flush=True)
        except Failed as error:
            for line in str(error).split("\n"):
                node, _, message = line.rpartition("\t")
                print(f"preflight: BAD {node or nodes[rank]}: rank {rank}: {message}", flush=True)
        problems += 1
        return False

    check("GPU", lambda: check_gpu(local_rank))
    check("output_dir", lambda: check_disk(options.output_dir, options.min_free_gb))
    # Rank 0 gives up first and says who is missing; the others wait for what it says.
    longest = options.seconds + LOCAL_SECONDS + 15
    if check("rendezvous", lambda: meeting.meet(options.seconds), longest):
        check("shared output_dir", meeting.check_shared)
        # NCCL connects all ranks first, which takes longer the more there are.
        limit = options.seconds + LOCAL_SECONDS
        reduce = partial(meeting.check_collectives, local_rank, limit)
        check("all-reduce", reduce, limit + LOCAL_SECONDS)
    if not problems:
        said = "; ".join(filter(None, reports))
        print(f"preflight: rank {rank} on {nodes[rank]}: ok; {said}", flush=True)
    meeting.part()
    return EXIT_PREFLIGHT if problems else 0


def within(seconds: float, what: str, function: Callable[[], str]) -> str:
    """Returns what `function` returns. Raises Failed if it raises, or if it takes
    longer: then its thread is left running."""
    future = ThreadPoolExecutor().submit(function)
    if not wait([future], seconds).done:
        raise Failed(f"{what}: no answer within {seconds:.0f} s")
    try:
        return future.result()
    except (Failed, Unavailable):
        raise
    except BaseException as error:
        raise Failed(f"{what}: {first_line(error)}") from None


def check_gpu(local_rank: int) -> str:
    """Checks that GPU `local_rank` exists and is empty. If SLURM gave no GPU,
    nothing is checked."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("SLURM_GPUS_ON_NODE")
    if not torch.cuda.is_available():
        if given:
            raise Failed(
                f"SLURM gave GPUs ({given}), but torch {torch.__version__} sees none: driver, or "
                f"a build for CPU"
            )
        return "no GPU"
    if local_rank >= torch.cuda.device_count():
        raise Failed(f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}")
    free, total = torch.cuda.mem_get_info(local_rank)
    name = torch.cuda.get_device_name(local_rank)
    if free < EMPTY * total:
        raise Failed(
            f"GPU {local_rank} ({name}) is in use: {free / 2**30:.1f} of {total / 2**30:.1f} GiB "
            f"free"
        )
    return f"{name}, {free / 2**30:.1f} GiB free"


def check_disk(directory: Path, min_free_gb: float) -> str:
    """Checks that `directory` returns a mebibyte as written, and has space for more."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".preflight-") as probe:
            content = os.urandom(1 << 20)
            probe.write(content)
            probe.flush()
            os.fsync(probe.fileno())
            if Path(probe.name).read_bytes() != content:
                raise Failed(f"{directory} returns other bytes than were written")
    except OSError as error:
        raise Failed(f"cannot write to {directory}: {error.strerror}") from None
    free = shutil.disk_usage(directory).free / 1e9
    if free < min_free_gb:
        raise Failed(f"{directory} has {free:.1f} GB free, less than {min_free_gb:g}")
    return f"{free:.0f} GB free"


def versions() -> dict[str, str]:
    """Returns what must be the same on all nodes."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    ours = {"python": platform.python_version(), "dsvae's code": digest.hexdigest()[:12]}
    return packages | ours


def odd_ones(ranks: list[dict[str, str]], nodes: list[str]) -> Iterator[str]:
    """Yields `node<tab>what differs` for every node whose versions differ from those of
    the majority of the ranks."""
    for name in ranks[0]:
        most = Counter(each[name] for each in ranks).most_common(1)[0][0]
        pairs = dict.fromkeys((node, each[name]) for node, each in zip(nodes, ranks, strict=True))
        for node, version in pairs:
            if version != most:
                yield f"{node}\t{name} {version}, most ranks have {most}"


class Meeting:
    """The ranks of a job, which meet at a store on rank 0."""

    def __init__(self, rank: int, nodes: list[str], directory: Path) -> None:
        self.rank, self.size, self.nodes = rank, len(nodes), nodes
        self.file = directory / f".preflight-{os.environ.get('SLURM_JOB_ID', os.getppid())}"
        self.store: dist.TCPStore | None = None

    def _arrived(self, word: str, ranks: Iterable[int], seconds: float) -> list[int]:
        """Returns those of the ranks that say the word at the store in time."""
        assert self.store is not None
        with contextlib.suppress(dist.DistError):
            keys = [f"{word}/{each}" for each in ranks]
            self.store.wait(keys, timedelta(seconds=seconds))
        return [each for each in ranks if self.store.check([f"{word}/{each}"])]

    def meet(self, seconds: float) -> str:
        """Checks that all ranks arrive, with the same versions. Rank 0 names
        the others."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            limit = timedelta(seconds=seconds)
            self.store = dist.TCPStore(
                address, port, self.size, self.rank == 0, limit, wait_for_workers=False
            )
        except (dist.DistError, OSError) as error:
            raise Failed(
                f"cannot reach {self.nodes[0]} ({address}:{port}) within {seconds:.0f} s: "
                f"{first_line(error)}"
            ) from None
        self.store.set(f"here/{self.rank}", json.dumps(versions()))
        if self.rank > 0:
            self.store.set_timeout(timedelta(seconds=seconds + LOCAL_SECONDS))
            if self.store.get("go") != b"1":
                raise Unavailable(
                    "not every rank arrived, or their versions differ: rank 0 says which"
                )
            return f"met {self.size - 1} other rank(s)"

        here = self._arrived("here", range(self.size), seconds)
        lines = [
            f"{node}\trank {each} did not arrive within {seconds:.0f} s"
            for each, node in enumerate(self.nodes)
            if each not in here
        ]
        if not lines:
            found = [json.loads(self.store.get(f"here/{each}")) for each in here]
            lines = list(odd_ones(found, self.nodes))
        if not lines:
            # Written before the others look for it.
            token = str(os.getpid())
            try:
                self.file.write_text(token)
            except OSError:
                token = ""  # check_disk has reported it
            self.store.set("token", token)
        self.store.set("go", "0" if lines else "1")
        if lines:
            raise Failed("\n".join(lines))
        return f"met {self.size - 1} other rank(s)"

    def check_shared(self) -> str:
        """Checks that this rank sees the file of rank 0, within the seconds that a
        network file system may need."""
        assert self.store is not None
        token = self.store.get("token").decode()
        if not token:
            return ""
        for _ in range(50):
            with contextlib.suppress(OSError):
                if self.file.read_text() == token:
                    return "shared"
            time.sleep(0.2)
        raise Failed(
            f"{self.file.parent} is not the directory that {self.nodes[0]} sees: it must lie on "
            f"a shared file system"
        )

    def check_collectives(self, local_rank: int, seconds: float) -> str:
        """Lets each rank send its number to each, and checks the sum of an all-reduce,
        each within so many seconds; reports its bandwidth."""
        assert self.store is not None
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        store, limit = dist.PrefixStore("group", self.store), timedelta(seconds=seconds)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, timeout=limit, rank=self.rank, world_size=self.size, store=store
        )
        sent = torch.arange(self.size, device=device) + self.rank * self.size
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        expected = torch.arange(self.size, device=device) * self.size + self.rank
        if wrong := (received != expected).nonzero().flatten().tolist():
            raise Failed(
                "\n".join(f"{self.nodes[each]}\trank {each} sent wrong numbers" for each in wrong)
            )

        count = MEBIBYTES * 2**20 // 4
        for _ in range(2):  # the first pass opens connections
            tensor = torch.full((count,), float(self.rank + 1), device=device)
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            if cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - begin
        total = self.size * (self.size + 1) / 2
        if not bool((tensor == total).all()):
            raise Failed(f"an all-reduce gave {tensor[0].item()}, not {total}")
        return (
            f"all-reduce of {MEBIBYTES} MiB in {took * 1e3:.1f} ms, "
            f"{count * 4 / took / 1e9:.2f} GB/s"
        )

    def part(self) -> None:
        """Leaves, rank 0 last, because the others need its store."""
        if self.store is None:
            return
        with contextlib.suppress(dist.DistError, OSError, RuntimeError):
            self.store.set(f"done/{self.rank}", "1")
            if self.rank == 0:
                here = [each for each in range(self.size) if self.store.check([f"here/{each}"])]
                self._arrived("done", here, 15)
                self.file.unlink(missing_ok=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A check that hangs in its thread, or a group that waits for a lost rank, must not
    # hold the process.
    os._exit(code)
