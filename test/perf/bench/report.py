"""Medians, spreads, tables, and the JSON that they come from."""

import os
import platform
import subprocess
from pathlib import Path
from statistics import median


def tail(found):
    return found["percentiles_us"]["99"] if found and "percentiles_us" in found else None


def summary(case, runs, beside, failed):
    """What a case's runs come to. A run that failed is `None` in its place; so is it in those of the case `beside`, which
    each run of a peer is compared with: ours over theirs, run by run."""
    made = [run for run in runs if run]
    values = [value for value, _, _ in made]
    limits = [limit for _, limit, _ in made if limit]
    tails = [tail(found) for _, _, found in made if tail(found) is not None]
    means = [found["mean_us"] for _, _, found in made if found and "mean_us" in found]
    pairs = [(ours, theirs) for ours, theirs in zip(beside or [], runs) if ours and theirs]
    ratios = [ours[0] / theirs[0] for ours, theirs in pairs if theirs[0]]
    tail_ratios = [tail(ours[2]) / tail(theirs[2]) for ours, theirs in pairs if tail(ours[2]) and tail(theirs[2])]
    return {
        "family": case.family, "row": case.row, "column": case.column, "unit": case.unit, "runs": values,
        "median": median(values), "min": min(values), "max": max(values),
        "limit": max(set(limits), key=limits.count) if limits else None,
        "p99_us": median(tails) if tails else None, "mean_us": median(means) if means else None,
        "ratio": median(ratios) if ratios else None, "p99_ratio": median(tail_ratios) if tail_ratios else None,
        "failed": failed,
    }


def number(value, unit):
    if unit != "IOPS":
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.0f} k" if value >= 10_000 else f"{value / 1e3:.1f} k"


def cell(found):
    if found is None:
        return ""
    unit = found["unit"]
    text = f"{number(found['median'], unit)} ({number(found['min'], unit)} to {number(found['max'], unit)})"
    if found["p99_us"] is not None:
        text += f", p99 {found['p99_us']:.0f} µs"
    if found["limit"] is not None:
        text += f", {found['limit']}"
    if found.get("of_ceiling"):
        text += f", {100 * found['of_ceiling']:.0f} %"
    if found["ratio"] is not None:
        tail = f", p99 {found['p99_ratio']:.2f} times" if found["p99_ratio"] is not None else ""
        text += f"; ringstone {found['ratio']:.2f} times that{tail}"
    if found["failed"]:
        text += f"; failed after {len(found['runs'])} runs"
    return text


def table(found):
    """One family as a Markdown table."""
    columns = list(dict.fromkeys(f["column"] for f in found))
    rows = list(dict.fromkeys(f["row"] for f in found))
    at = {(f["row"], f["column"]): f for f in found}
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([row] + [cell(at.get((row, column))) for column in columns]) + " |" for row in rows]
    return "\n".join(lines)


def machine(options):
    """What it was measured on."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
                  if line.startswith("MemTotal:"))
    root = Path(__file__).resolve().parents[3]
    commit = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], text=True, capture_output=True)
    return {
        "cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / (1 << 20)), "kernel": platform.release(),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(), "commit": commit.stdout.strip() or "unknown",
        "load_average": list(os.getloadavg()), "target_core": options.target_core, "load_core": options.load_core,
        "runs": options.runs, "seconds": options.seconds, "peers": {**dict.fromkeys(options.peer), **options.peer_command},
    }


def sentence(about, runs=True):
    kind = "a virtual machine" if about["virtual"] else "a machine"
    how = f"; median (least to most) of {about['runs']} interleaved runs of {about['seconds']:g} s" if runs else ""
    near = about.get("near")
    where = f"; cores within {near['ns']} ns of each other in all but {near['far']} of {near['runs']} measurements" if near else ""
    return (f"Measured on {kind} with {about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, Linux "
            f"{about['kernel']}; target on core {about['target_core']}, load on core {about['load_core']}{where}{how}; commit "
            f"{about['commit']}.")
