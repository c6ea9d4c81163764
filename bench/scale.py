"""Writes the tables of book/at_scale.md, between its marks, from growth.jsonl and results.jsonl.

What large data sets would cost is the measured cost of the largest work, in proportion; memory that each recording
takes is the difference between the most and the fewest.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping

from common import RESULTS, Record
from growth import CFG, GROWTH, remark
from table import figure, newest, update

PAGE = RESULTS.parent.parent / "book" / "at_scale.md"
HOUR, DAY, YEAR = 3600, 24 * 3600, 365 * 24 * 3600
# Hours of sound, and recordings
DATA_SETS = {"MAESTRO": (199, 1276), "ten thousand hours": (10_000, 200_000), "Noise2Music": (340_000, 6_800_000)}
WAV = 44_100 * 2 * 2  # bytes of a second
CHUNK = 1024  # frames


def growths(lines: Iterable[str]) -> dict[str, Record]:
    """The last record of each part."""
    return {record["part"]: record for record in map(json.loads, filter(str.strip, lines))}


def size(value: float) -> str:
    """A number of bytes, legibly."""
    power = min(max(0, int(math.log10(max(value, 1)) // 3)), 5)
    return f"{figure(value / 1000**power)} {['bytes', 'kB', 'MB', 'GB', 'TB', 'PB'][power]}"


def lasting(seconds: float) -> str:
    """A time, legibly."""
    units = {"years": YEAR, "days": DAY, "hours": HOUR, "minutes": 60}
    unit = next((unit for unit, length in units.items() if seconds >= 2 * length), "seconds")
    return f"{figure(seconds / units.get(unit, 1))} {unit}"


def growth_table(parts: Mapping[str, Record]) -> str:
    """Every measure of every part: four figures and the slope."""
    rows = ["| work | cost | × 1 | × 2 | × 4 | × 8 | slope | grows |", "|---|---|---|---|---|---|---|---|"]
    for part, record in parts.items():
        work = f"{part}: {figure(record['work'][0])} to {figure(record['work'][-1])} {record['unit']}"
        for name, measure in record["measures"].items():
            cells = [*map(figure, measure["figures"]), "", ""][:4]
            note = remark(measure["slope"]) or "in proportion"
            rows.append(f"| {work} | {name} | {' | '.join(cells)} | {measure['slope']:.2f} | {note} |")
            work = ""
    record = next(iter(parts.values()))
    return "\n".join([f"{record['cpu']}, one thread, PyTorch {record['torch']}:", "", *rows]) + "\n"


def rate(record: Record, measure: str) -> float:
    """Cost of one unit of work, at the largest."""
    return record["measures"][measure]["figures"][-1] / record["work"][-1]


def step(record: Record, measure: str) -> float:
    """What one unit of work adds to a cost."""
    figures, work = record["measures"][measure]["figures"], record["work"]
    return max(0.0, (figures[-1] - figures[0]) / (work[-1] - work[0]))


def passes(results: Iterable[Record]) -> dict[str, float]:
    """Blocks a second in training, by network and machine: the best that was measured."""
    found: dict[str, float] = {}
    for record in results:
        network = record["comparison"].partition("training ")[2].partition(",")[0]
        if network in ("nano", "base"):
            place = f"one {record['gpu']}" if "gpu" in record else f"{record['cores']} cores"
            best = max(result["median"] for result in record["results"].values())
            key = f"{network} on {place}"
            found[key] = max(best, found.get(key, 0.0))
    return found


def rows(parts: Mapping[str, Record], results: Iterable[Record], hours: float, recordings: int) -> dict[str, str]:
    """What a data set would cost."""
    frames = hours * HOUR * CFG.sample_rate / CFG.hop_length
    blocks = frames / CFG.n_frames
    chunks = recordings * math.ceil(frames / recordings / CHUNK)
    sound, short = parts["preparation"], parts["short recordings"]
    search = parts["evaluation: search for copies"]
    training = passes(results)
    prepared = hours * rate(sound, "seconds of a core")
    looked = next(name for name in search["measures"] if "blocks" in name)
    made = {
        "hours of sound": f"{hours:,}",
        "recordings": f"{recordings:,}",
        "as WAV, 44.1 kHz, stereo, 16 bit": size(hours * HOUR * WAV),
        "store": size(hours * 1e6 * rate(sound, "store, MB")),
        "files or objects in it": f"{recordings + chunks:,}",
        "the same with one shard a recording": f"{2 * recordings:,}",
        "its index, read as a whole": size(recordings * 1000 * rate(short, "index, kB")),
        "memory that `prepare` takes for its results": size(recordings * 1e6 / 2 * step(short, "peak of memory, MB")),
        "to read that WAV at 1 GB a second": lasting(hours * HOUR * WAV / 1e9),
        "preparation, on one core": lasting(prepared),
        "preparation, on 16 cores for 24 hours a day": lasting(prepared / 16),
        "to find that nothing is left to do, on one core": lasting(
            recordings * rate(short, "nothing left to do, seconds of a core")),
        "blocks in one pass": f"{blocks:,.0f}",
        "memory for the split (`in_memory`)": size(frames * CFG.n_bins),
        "memory for the order of a pass": size(8 * blocks),
        **{f"one pass of training {name}": lasting(blocks / best) for name, best in training.items()},
        **{f"cores that read from a disk what trains {name}": figure(best * rate(parts["loading"], "seconds of a core"))
           for name, best in training.items()},
        "search for copies: memory": size(hours * 1e6 * rate(search, "corpus, MB")),
        f"search for copies: {looked.partition(',')[0]} on one core": lasting(hours * step(search, looked)),
    }
    return made


def scale_table(parts: Mapping[str, Record], results: Iterable[Record]) -> str:
    """The data sets beside each other."""
    results = list(results)
    columns = [rows(parts, results, *amount) for amount in DATA_SETS.values()]
    lines = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join([f"| | {' | '.join(DATA_SETS)} |", "|---|---|---|---|", *lines]) + "\n"


def page(text: str, growth_lines: Iterable[str], result_lines: Iterable[str]) -> str:
    """The page's text with today's tables."""
    parts = growths(growth_lines)
    text = update(text, growth_table(parts), "growth")
    return update(text, scale_table(parts, newest(result_lines)), "scale")


if __name__ == "__main__":
    if not GROWTH.exists():
        sys.exit(f"there is no {GROWTH.name} yet: python bench/growth.py")
    PAGE.write_text(page(PAGE.read_text(), GROWTH.read_text().splitlines(), RESULTS.read_text().splitlines()))
