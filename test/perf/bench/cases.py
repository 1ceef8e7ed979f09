"""What is measured. A case is one number from one command; a family is the cases of one table and one plot."""

from dataclasses import dataclass, field, replace


# The column of what no target can exceed on the same sockets.
CEILING = "bare sockets"


@dataclass(frozen=True)
class Case:
    """One row's column: how to make the number is up to the kind (see `measure`)."""

    family: str
    row: str
    column: str
    kind: str
    unit: str = "IOPS"
    options: dict = field(default_factory=dict, hash=False)
    # The key of the case that this one, of a peer, stands beside.
    beside: str | None = None

    @property
    def key(self):
        return f"{self.family} / {self.row} / {self.column}"


def with_peers(case, peers):
    """A case, and directly behind it the same of each peer: what disturbs one of them disturbs the other."""
    yield case
    for peer in peers:
        ours = case.column.startswith("ringstone")
        column = case.column.replace("ringstone", peer, 1) if ours else f"{peer}, {case.column}"
        yield replace(case, column=column, options={**case.options, "peer": peer}, beside=case.key)


def size(bytes_):
    return f"{bytes_ >> 10}K" if bytes_ >= 1024 else str(bytes_)


def nvmf(quick, peers):
    """NVMe/TCP over loopback: target on one core, load on another."""
    loads = [("randread", 4096, qd) for qd in (1, 32, 128)] + [("randwrite", 4096, qd) for qd in (1, 32, 128)]
    loads += [("read", 131072, 32), ("write", 131072, 32)]
    columns = [(1, False), (4, False), (1, True), (4, True)]
    # A queue has 128 entries, so this is 128 on each of 4.
    loads += [("randread", 4096, 512), ("randwrite", 4096, 512)]
    if quick:
        loads, columns = [("randread", 4096, 128), ("randwrite", 4096, 1)], [(1, False), (4, True)]
    for bdev in ("null", "malloc"):
        for rw, bs, qd in loads:
            row = f"{bdev} {size(bs)} {rw} depth {qd}"
            for queues, digests in columns:
                if qd > 128 * queues:
                    continue
                column = f"{queues} queue{'s' if queues > 1 else ''}{', digests' if digests else ''}"
                options = {"bdev": bdev, "rw": rw, "bs": bs, "qd": qd, "queues": queues, "digests": digests}
                yield from with_peers(Case("nvmf", row, column, "perf", options=options), peers)
            options = {"mode": "read" if "read" in rw else "write", "bs": bs, "qd": qd,
                       "memory": 512 if bdev == "malloc" else 0}
            yield Case("nvmf", row, CEILING, "ceiling", options=options)


def layer(quick, peers):
    """The bdev layer in one process, one core."""
    rows = [("null", "randread"), ("null", "randwrite"), ("passthru", "randread"), ("raid1", "randread"),
            ("raid1", "randwrite"), ("malloc", "randread"), ("malloc", "randwrite")]
    for bdev, rw in rows[:2] if quick else rows:
        case = Case("layer", f"{bdev} 4K {rw} depth 128", "ringstone", "bdevperf",
                    options={"bdev": bdev, "rw": rw, "bs": 4096, "qd": 128})
        yield from with_peers(case, peers)


def files(quick, peers):
    """A file through its bdev, and the same work by fio's io_uring engine."""
    rows = [(where, rw, qd) for where in ("disk", "memory") for rw in ("randread", "randwrite") for qd in (1, 64)]
    for where, rw, qd in rows[:1] if quick else rows:
        row = f"file in memory 4K {rw} depth {qd}" if where == "memory" else f"file on disk 4K {rw} depth {qd}"
        options = {"where": where, "rw": rw, "bs": 4096, "qd": qd}
        yield from with_peers(Case("files", row, "ringstone", "bdevperf", options={"bdev": where, **options}), peers)
        yield Case("files", row, "fio io_uring", "fio", options=options)


def cpu(quick, peers):
    """CPU time of the target for one command, at a rate far from its limit, and what the command takes."""
    rows = [(rw, rate) for rw in ("randread", "randwrite") for rate in (10_000, 100_000)]
    for rw, rate in rows[1:2] if quick else rows:
        row = f"null 4K {rw}, {rate // 1000} k a second"
        for poll, column in ((None, "ringstone"), ("coalesce", "--poll coalesce")):
            for what, more in (("cpu", ""), ("p50", ", median latency")):
                options = {"rw": rw, "rate": rate, "what": what, "poll": poll}
                case = Case("cpu", row, column + more, "cpu_at_rate", "µs CPU" if what == "cpu" else "µs", options)
                yield from with_peers(case, () if poll else peers)


def wake(quick, peers):
    """The median of commands that come so rarely that the target sleeps before each."""
    for rate in (100,) if quick else (20, 100):
        row = f"null 4K randread, {rate} a second"
        yield from with_peers(Case("wake", row, "ringstone", "wake", "µs", {"rate": rate}), peers)
        yield Case("wake", row, CEILING, "bare_wake", "µs", {"rate": rate})


def fairness(quick, peers):
    """What connections get that all want as much as they can."""
    for rw, queues, qd in [("randread", 64, 4)] if quick else [("randread", 64, 4), ("randwrite", 64, 4), ("randread", 64, 32)]:
        row = f"null 4K {rw}, {queues} connections of depth {qd}"
        options = {"rw": rw, "queues": queues, "qd": qd}
        yield from with_peers(Case("fairness", row, "ringstone", "fairness", "%", options), peers)


def scaling(quick, _peers):
    """What a second reactor brings, where there is no core left for the load."""
    for rw in ("randread",) if quick else ("randread", "randwrite"):
        row = f"malloc 4K {rw}, 2 hosts of depth 128"
        for what, column in (("one", "1 reactor"), ("apart", "2 processes of 1 reactor"), ("two", "2 reactors")):
            yield Case("scaling", row, column, "scaling", "µs CPU", {"rw": rw, "what": what})
        yield Case("scaling", row, "2 reactors do, times 1", "scaling", "times", {"rw": rw, "what": "times"})


def idle(quick, peers):
    """What a server costs that nobody asks for anything."""
    for connections in (0, 8) if quick else (0, 8, 1000):
        for column, what, unit in (("CPU, % of a core", "cpu", "%"), ("memory, MiB", "rss", "MiB")):
            case = Case("idle", f"{connections} connections", column, "idle", unit, {"connections": connections, "what": what})
            yield from with_peers(case, peers)


FAMILIES = {"nvmf": nvmf, "layer": layer, "files": files, "cpu": cpu, "wake": wake, "fairness": fairness, "scaling": scaling,
            "idle": idle}

# Families in one process: their peers are programs that load a device of their own, and no targets.
LOCAL = ("layer", "files")

TITLES = {
    "nvmf": "NVMe/TCP over loopback",
    "layer": "The bdev layer in one process",
    "files": "A file through its bdev, beside fio",
    "cpu": "CPU time of the target for one command, at a rate, and its latency",
    "wake": "A command that finds the target asleep",
    "fairness": "Fairness: the most and the least that a connection gets, apart by % of the mean",
    "scaling": "A second reactor: CPU time of the target for one command",
    "idle": "Idle",
}
