"""One HTML page of what benchmarks found: rooflines, bars and the machine, from files that --json wrote.

    python -m bench.report results/*.json --out report.html

The page stands alone: it loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import click

from pytrain.errors import UserError
from pytrain.progress import compact

from . import _record
from ._svg import COLOURS, Bar, Point, bars, roofline

Found = Mapping[str, Any]
SMALLEST_OP = 0.001
"""Of a step: ops that take less are drawn as one bar."""
CEILINGS = {
    "fp32_gflops": ("Multiply-adds in fp32", "GFLOP/s"),
    "bf16_gflops": ("Dot products of bf16 pairs", "GFLOP/s"),
    "read_gb_s": ("Reading memory", "GB/s"),
    "copy_gb_s": ("Copying memory, read and written bytes together", "GB/s"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222; }
svg { font: 12px system-ui, sans-serif; max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; vertical-align: top; text-align: left; }
.invalid { color: #a8434c; font-weight: bold; }
code, .note { color: #666; } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em; }
"""


def _bar(label: str, values: Found, unit: str, series: int = 0, digits: int = 1) -> Bar:
    return Bar(label, values["median"], values["min"], values["max"], f"{values['median']:.{digits}f} {unit}", series)


def _legend(names: Sequence[str]) -> str:
    spans = (f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {escape(n)}' for i, n in enumerate(names))
    return f"<p>{' &nbsp; '.join(spans)}</p>"


def peak_section(found: Found) -> Iterator[str]:
    """Ceilings by number of threads."""
    for key, (title, unit) in CEILINGS.items():
        rows = [row for row in found["cases"] if row.get(key)]
        if rows:
            yield f"<h3>{title}</h3>"
            yield bars([_bar(_threads(row["threads"]), row[key], unit) for row in rows])
    copies = [
        _bar(f"{_threads(row['threads'])}, {size['bytes_per_thread'] // 1024:,} KiB", size["copy_gb_s"], "GB/s")
        for row in found["cases"]
        for size in row["sizes"]
    ]
    if copies:
        yield "<h3>Copying by what a thread reads and writes, over and over</h3>"
        yield bars(copies)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def step_section(found: Found) -> Iterator[str]:
    """Tokens per second beside the peers, memory, and where the time went."""
    yield f"<p>{escape(_words(found['options'], 'model', 'batch', 'seq', 'dtype', 'tp'))}</p>"
    runs = {"pytrain": found} | {name: peer for name, peer in found["peers"].items() if "skipped" not in peer}
    speeds, memory = [], []
    for number, (name, run) in enumerate(runs.items()):
        seconds = run["step_seconds"]
        text = f"{compact(run['tokens_per_s'])} tokens/s, {run['mfu']:.1%} of peak"
        rates = (found["tokens"] / seconds["max"], found["tokens"] / seconds["min"])
        speeds.append(Bar(name, run["tokens_per_s"], *rates, text, number))
        size = run["peak_rss_bytes"] / 1e9
        memory.append(Bar(name, size, size, size, f"{size:.2f} GB", number))
    yield bars(speeds)
    for name, peer in found["peers"].items():
        if "skipped" in peer:
            yield f"<p>{escape(name)}: skipped: {escape(peer['skipped'])}</p>"
    if found["valid"] is False:
        yield f'<p class="invalid">Invalid: {escape(found["validity"])}</p>'
    if found["spell"] is not None:
        yield f'<p class="invalid">{escape(found["spell"])}</p>'
    yield "<h3>Peak memory</h3>" + bars(memory)
    yield "<h3>Where a step goes</h3>"
    yield f"<p>One step, op by op. Python's share of whole steps: {found['python_share']:.2%}. {_FUSED}</p>"
    yield bars(_op_bars(found["ops"]))


_FUSED = "The head is one op with its loss and gradients, and counts as head.forward."


def _op_bars(ops: Mapping[str, float]) -> list[Bar]:
    """The ops of a step in their order, and those too small to be seen as one."""
    whole = sum(ops.values()) or 1.0
    shown = {name: seconds for name, seconds in ops.items() if seconds >= SMALLEST_OP * whole}
    rest = {name: seconds for name, seconds in ops.items() if name not in shown}
    if rest:
        shown[f"{len(rest)} others"] = sum(rest.values())
    texts = {name: f"{1e3 * seconds:.1f} ms, {seconds / whole:.1%}" for name, seconds in shown.items()}
    return [Bar(name, seconds, seconds, seconds, texts[name]) for name, seconds in shown.items()]


def kernels_section(found: Found) -> Iterator[str]:
    """Shares of the ceiling that binds each operation."""
    isas = list(dict.fromkeys(row["isa"] for row in found["kernels"]))
    yield "<p>The dashed line is the ceiling: copying as many bytes, or the peak of the arithmetic.</p>"
    yield _legend(isas)
    rows = [
        Bar(
            f"{row['name']}",
            row["share"],
            row["rate"]["min"] / row["ceiling"],
            row["rate"]["max"] / row["ceiling"],
            f"{row['share']:.0%} ({row['rate']['median']:.1f} {row['unit']})",
            isas.index(row["isa"]),
        )
        for row in found["kernels"]
    ]
    yield bars(rows, ceiling=1.0)


def attention_section(found: Found) -> Iterator[str]:
    """GFLOP/s by shape, ours and PyTorch's."""
    yield _legend(["pytrain", "torch"])
    rows = []
    for case in found["cases"]:
        label = f"{case['dtype']} T {case['length']}, D {case['head_size']}"
        rows.append(_bar(label, case["gflops"], "GFLOP/s"))
        if "torch_gflops" in case:
            rows.append(_bar("", case["torch_gflops"], "GFLOP/s", 1))
    yield bars(rows)


def peers_section(found: Found) -> Iterator[str]:
    """Products and rows, ours and others'."""
    names = ["pytrain", "numpy", "torch"]
    yield _legend(names)
    for unit in ("GFLOP/s", "GB/s"):
        rows = [
            _bar(f"{case['dtype']} {case['name']}" if who == "pytrain" else "", rate, unit, names.index(who))
            for case in found["cases"]
            if case["unit"] == unit
            for who, rate in case["rate"].items()
        ]
        if rows:
            yield bars(rows)


def matmul_section(found: Found) -> Iterator[str]:
    """Products of a step, as shares of the peak, by number of threads."""
    yield f"<p>{escape(_words(found['options'], 'dtype', 'rows', 'runs'))}</p>"
    for whole in found["weighted"]:
        least = f"least {whole['least']} {whole['least_share']:.1%}"
        text = f"weighted by FLOPs over a step {whole['share']:.1%} (best runs {whole['best_share']:.1%}), {least}"
        yield f"<h3>{_threads(whole['threads'])}</h3><p>{escape(text)}</p>"
        rows = []
        for case in found["cases"]:
            if case["threads"] == whole["threads"]:
                share, low, high = (case["gflops"][name] / whole["peak_gflops"] for name in ("median", "min", "max"))
                ratios = "".join(f", {ratio['median']:.2f} x {who}" for who, ratio in case["ratio"].items())
                text = f"{share:.0%} ({case['gflops']['median']:.0f}){ratios}"
                rows.append(Bar(case["name"], share, low, high, text))
        yield bars(rows, ceiling=1.0)
    for probe in found["probes"]:
        if probe["spell"] is not None:
            yield f'<p class="invalid">{_threads(probe["threads"])}: {escape(probe["spell"])}</p>'


def loader_section(found: Found) -> Iterator[str]:
    """Tokens per second."""
    rows = [
        Bar(
            case["what"],
            case["tokens_per_s"]["median"],
            case["tokens_per_s"]["min"],
            case["tokens_per_s"]["max"],
            f"{compact(case['tokens_per_s']['median'])} tokens/s",
        )
        for case in found["cases"]
    ]
    yield bars(rows)


def collectives_section(found: Found) -> Iterator[str]:
    """Times of each algorithm over MPI's, for each size."""
    for case in found["cases"]:
        yield f"<h3>{case['ranks']} ranks, {case['bytes']:,} bytes</h3>"
        rows = [_bar(name, _scaled(value, 1e6), "us") for name, value in case["seconds"].items()]
        yield bars(rows)


def scaling_section(found: Found) -> Iterator[str]:
    """Tokens per second of two ranks over those of one rank with two threads."""
    yield _legend(["two ranks", "overlap off"])
    for series, (kind, title) in enumerate((("ranks", "two ranks"), ("in-turn", "overlap off"))):
        yield f"<h3>{title}, over one rank with as many threads</h3>"
        rows = []
        for case in found["cases"]:
            ratio = case["ratios"][kind]
            text = f"{ratio['median']:.3f} (asked {case['target']:.2f})"
            rows.append(Bar(case["name"], ratio["median"], ratio["min"], ratio["max"], text, series))
        yield bars(rows, ceiling=1.0)


def _scaled(values: Found, factor: float) -> dict[str, float]:
    return {name: factor * values[name] for name in ("median", "min", "max")}


TITLES = {
    "peak": "Ceilings of this machine",
    "step": "Training steps",
    "matmul": "Products of a step",
    "kernels": "Kernels",
    "attention": "Attention, forward and backward",
    "peers": "Beside NumPy and PyTorch",
    "loader": "Data loader",
    "collectives": "Collectives",
    "scaling": "Two ranks beside one",
}
SECTIONS: Mapping[str, Callable[[Found], Iterator[str]]] = {
    "peak": peak_section,
    "step": step_section,
    "matmul": matmul_section,
    "kernels": kernels_section,
    "attention": attention_section,
    "peers": peers_section,
    "loader": loader_section,
    "collectives": collectives_section,
    "scaling": scaling_section,
}


def roofline_section(files: Sequence[Found]) -> Iterator[str]:
    """Kernels under the ceilings that `bench.peak` measured on the same machine, if it is among the files."""
    peaks = [found for found in files if found["bench"] == "peak"]
    rows = [row for found in files if found["bench"] == "kernels" for row in found["kernels"] if row["flops"]]
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    points = [
        Point(
            f"{row['name']} ({row['isa']})",
            row["flops"] / row["bytes"],
            row["flops"] / row["seconds"]["median"] / 1e9,
            isas.index(row["isa"]),
        )
        for row in rows
    ]
    if not peaks or not points:
        return
    most = max(peaks[-1]["cases"], key=lambda row: row["threads"])
    yield "<h2>Roofline</h2><p>Point at a dot for its name. A dot above the slope lives in a cache.</p>"
    yield _legend(isas)
    yield roofline(points, most["fp32_gflops"]["max"], most["copy_gb_s"]["max"])


def _words(values: Found, *names: str) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if name in values)


def machine_table(machine: Found) -> str:
    """Where the numbers come from."""
    names = (
        *("cpu", "caches", "memory", "cores_in_mask", "governor", "threads", "isa", "load"),
        *("pytrain", "commit", "date"),
    )
    rows = "".join(f"<tr><td>{name}</td><td>{escape(str(machine.get(name, '')))}</td></tr>" for name in names)
    return f"<details><summary>machine</summary><table>{rows}</table></details>"


def _headlines(files: Sequence[Found]) -> Iterator[str]:
    """What a reader in a hurry wants: the machine, and a line for each training step that was measured."""
    machine = files[-1]["machine"] if files else {}
    about = [str(machine[name]) for name in ("cpu", "isa", "commit", "date") if name in machine]
    yield f"<p>{escape(', '.join(about))}</p>"
    rows = [row for found in files if found["bench"] == "step" for row in _headline_rows(found)]
    if rows:
        names = ("", "tokens/s", "of peak", "memory", "pytrain's speed", "pytrain's memory")
        yield f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"
    yield '<p class="note">A bar is a median; the line across it goes from the smallest to the largest value.</p>'


def _headline_rows(found: Found) -> Iterator[str]:
    """The trainer and its peers, how many times its speed and what share of its memory the trainer has."""
    options = found["options"]
    shape = f"{options.get('model')} {options.get('batch')} x {options.get('seq')} {options.get('dtype')}"
    for name, run in {"pytrain": found, **found["peers"]}.items():
        if "skipped" in run:
            continue
        cells = [f"{shape}, {name}", compact(run["tokens_per_s"]), f"{run['mfu']:.1%}"]
        cells.append(f"{run['peak_rss_bytes'] / 1e9:.2f} GB")
        ratio = found.get("ratios", {}).get(name)
        if ratio is not None:
            invalid = " (invalid)" if found["valid"] is False else ""
            cells += [f"{ratio['speed']['median']:.2f} x{invalid}", f"{ratio['memory']:.2f} x"]
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def page(files: Sequence[Found]) -> str:
    """The whole page."""
    parts = ["<h1>pytrain benchmarks</h1>", *_headlines(files)]
    parts += roofline_section(files)
    for found in files:
        section = SECTIONS.get(found["bench"])
        if section is not None:
            name = found["bench"]
            parts += [f"<h2>{TITLES[name]} <code>bench.{name}</code></h2>", *section(found)]
            parts.append(machine_table(found["machine"]))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>pytrain benchmarks</title>'
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="report.html", show_default=True, type=click.Path(path_type=Path), help="The page.")
def command(files: tuple[Path, ...], out: Path) -> None:
    """Make a page of results that --json wrote."""
    found = [_record.read(path) for path in files]
    known = []
    for path, entry in zip(files, found, strict=True):
        if entry["bench"] not in SECTIONS:
            print(f"{path}: left out, since the report has no section for {entry['bench']}")
        elif entry.get("format") != _record.FORMAT:
            print(
                f"{path}: left out, since it has format {entry.get('format')}, and this report reads {_record.FORMAT}"
            )
        else:
            known.append(entry)
    try:
        out.write_text(page(known), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    print(f"wrote {out}")


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench report` does."""
    command.main(arguments, prog_name="pytrain bench report", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.report")
