"""What is measured. A case is one number from one command; a family is the cases of one table and one plot."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One row's column: how to make the number is up to the kind (see `measure`)."""

    family: str
    row: str
    column: str
    kind: str
    unit: str = "IOPS"
    options: dict = field(default_factory=dict, hash=False)

    @property
    def key(self):
        return f"{self.family} / {self.row} / {self.column}"


def size(bytes_):
    return f"{bytes_ >> 10}K" if bytes_ >= 1024 else str(bytes_)


def nvmf(quick):
    """NVMe/TCP over loopback: target on one core, load on another."""
    loads = [("randread", 4096, qd) for qd in (1, 32, 128)] + [("randwrite", 4096, qd) for qd in (1, 32, 128)]
    loads += [("read", 131072, 32), ("write", 131072, 32)]
    columns = [(1, False), (4, False), (1, True), (4, True)]
    if quick:
        loads, columns = [("randread", 4096, 128), ("randwrite", 4096, 1)], [(1, False), (4, True)]
    for bdev in ("null", "malloc"):
        for rw, bs, qd in loads:
            row = f"{bdev} {size(bs)} {rw} depth {qd}"
            for queues, digests in columns:
                column = f"{queues} queue{'s' if queues > 1 else ''}{', digests' if digests else ''}"
                options = {"bdev": bdev, "rw": rw, "bs": bs, "qd": qd, "queues": queues, "digests": digests}
                yield Case("nvmf", row, column, "perf", options=options)
            options = {"mode": "read" if "read" in rw else "write", "bs": bs, "qd": qd,
                       "memory": 512 if bdev == "malloc" else 0}
            yield Case("nvmf", row, "bare sockets", "ceiling", options=options)


def layer(quick):
    """The bdev layer in one process, one core."""
    rows = [("null", "randread"), ("null", "randwrite"), ("passthru", "randread"), ("malloc", "randread"),
            ("malloc", "randwrite")]
    for bdev, rw in rows[:2] if quick else rows:
        yield Case("layer", f"{bdev} 4K {rw} depth 128", "ringstone", "bdevperf",
                   options={"bdev": bdev, "rw": rw, "bs": 4096, "qd": 128})


def files(quick):
    """A file through its bdev, and the same work by fio's io_uring engine."""
    rows = [(where, rw, qd) for where in ("disk", "memory") for rw in ("randread", "randwrite") for qd in (1, 64)]
    for where, rw, qd in rows[:1] if quick else rows:
        row = f"file in memory 4K {rw} depth {qd}" if where == "memory" else f"file on disk 4K {rw} depth {qd}"
        options = {"where": where, "rw": rw, "bs": 4096, "qd": qd}
        yield Case("files", row, "ringstone", "bdevperf", options={"bdev": where, **options})
        yield Case("files", row, "fio io_uring", "fio", options=options)


def idle(quick):
    """What a server costs that nobody asks for anything."""
    for hosts in (0, 8):
        yield Case("idle", f"{hosts} hosts connected", "CPU, % of a core", "idle", "%", {"hosts": hosts, "what": "cpu"})
        yield Case("idle", f"{hosts} hosts connected", "memory, MiB", "idle", "MiB", {"hosts": hosts, "what": "rss"})


FAMILIES = {"nvmf": nvmf, "layer": layer, "files": files, "idle": idle}

TITLES = {
    "nvmf": "NVMe/TCP over loopback",
    "layer": "The bdev layer in one process",
    "files": "A file through its bdev, beside fio",
    "idle": "Idle",
}
