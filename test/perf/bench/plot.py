"""One SVG a family: bars of the medians with their spread."""

from pathlib import Path


def available():
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    # The same numbers make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "ringstone"
    matplotlib.rcParams["svg.fonttype"] = "none"
    return True


def draw(title, found, path):
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    rows = list(dict.fromkeys(f["row"] for f in found))
    columns = list(dict.fromkeys(f["column"] for f in found))
    at = {(f["row"], f["column"]): f for f in found}
    units = {f["column"]: f["unit"] for f in found}
    # Columns of different units have a chart each.
    groups = list(dict.fromkeys(units[column] for column in columns))
    figure, charts = pyplot.subplots(1, len(groups), figsize=(9, 1.2 + 0.22 * len(rows) * max(2, len(columns))), squeeze=False)
    for chart, unit in zip(charts[0], groups):
        shown = [column for column in columns if units[column] == unit]
        height = 0.8 / len(shown)
        for i, column in enumerate(shown):
            there = [(j, at[(row, column)]) for j, row in enumerate(rows) if (row, column) in at]
            medians = [f["median"] for _, f in there]
            spread = [[f["median"] - f["min"] for _, f in there], [f["max"] - f["median"] for _, f in there]]
            chart.barh([j + i * height for j, _ in there], medians, height=height * 0.9, xerr=spread, label=column,
                       error_kw={"elinewidth": 0.8})
        chart.set_yticks([j + 0.4 - height / 2 for j in range(len(rows))], rows, fontsize=8)
        chart.invert_yaxis()
        chart.set_xlabel(unit)
        chart.xaxis.set_major_formatter(EngFormatter())
        chart.set_xlim(left=0)
        if len(shown) > 1:
            chart.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # Lines without blanks at their ends, as the other files of the project.
    text = Path(path).read_text()
    Path(path).write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
