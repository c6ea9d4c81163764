"""Writes the tables of book/bench.md, between its lines `<!-- bench -->` and `<!-- /bench -->`, from results.jsonl."""

import json
import sys
from collections.abc import Iterable

from common import RESULTS, Record
from generation import settings

PAGE = RESULTS.parent.parent / "book" / "bench.md"


def figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def newest(lines: Iterable[str]) -> list[Record]:
    """The last record of each comparison on each kind of device, in the order in which these first came."""
    records = (json.loads(line) for line in lines if line.strip())
    return list({(record["device"], record["comparison"]): record for record in records}.values())


def heading(record: Record) -> str:
    """The machine that a record was made on."""
    cpu = f"{record['cores']} cores of {record['cpu']} ({record['capability']}, {record['threads']} threads)"
    place = f"One {record['gpu']} beside {cpu}" if "gpu" in record else cpu
    return f"{place}, PyTorch {record['torch']}:"


def row(record: Record) -> str:
    """A comparison: the first contender's figure, then the others' with their ratios to it."""
    cells = []
    for name, result in record["results"].items():
        peer, *setting = name.split(",")
        version = f" {record['peers'][peer]}" if peer in record["peers"] else ""
        spread = f"{figure(result['median'])} ({figure(result['min'])}–{figure(result['max'])})"
        cell = f"{','.join([peer + version, *setting])}: {spread}"
        if ratio := record["ratios"].get(name):
            cell += f", **{figure(ratio['median'])} ×** ({figure(ratio['min'])}–{figure(ratio['max'])})"
        cells.append(cell)
    return f"| {record['comparison']}, {record['unit']} | {cells[0]} | {'<br>'.join(cells[1:])} |"


def in_short(records: Iterable[Record]) -> list[str]:
    """How long one waits for music from the shipped model, in a line, where that was measured with today's default."""
    results = {record["comparison"]: record["results"] for record in records}
    medians = {name: next(iter(found.values()))["median"] for name, found in results.items()}
    second, first = medians.get("generation with nano"), medians.get("first sound of nano")
    if not (second and first and next(iter(settings())) in results["generation with nano"]):
        return []
    return [f"twenty seconds of music take {figure(20 * second)} s, and the first sound comes after {figure(first)} s."]


def table(lines: Iterable[str]) -> str:
    """The page's part: a table for each machine."""
    machines: dict[str, list[Record]] = {}
    for record in newest(lines):
        machines.setdefault(heading(record), []).append(record)
    parts = ([name, *in_short(records), "", "| | | beside it |", "|---|---|---|", *map(row, records)]
             for name, records in machines.items())
    return "\n\n".join(map("\n".join, parts)) + "\n"


def update(text: str, made: str, mark: str) -> str:
    """`text` with `made` between the lines of the mark. ValueError where these are missing."""
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not (begin and end):
        raise ValueError(f"the lines <!-- {mark} --> and <!-- /{mark} --> are missing; put them where figures belong")
    return before + begin + made + end + after


if __name__ == "__main__":
    if not RESULTS.exists():
        sys.exit(f"there is no {RESULTS.name} yet: make bench")
    PAGE.write_text(update(PAGE.read_text(), table(RESULTS.read_text().splitlines()), "bench"))
