"""The comparisons of bench/, tiny: what they record, not how long anything takes. The book's tables are made of it."""

import importlib
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pianodiff.model import PRESETS, count
from pianodiff.unet import UNetConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("common", "samplers", "sound", "network", "generation", "training", "growth", "table", "scale", "gpu",
           "card", "shapes")
TINY = UNetConfig(n_bins=16, n_frames=8, channels=(8, 16), blocks=(1, 1), attention=("", "ft"), emb_channels=16,
                  cond_channels=(8, 8))


@pytest.fixture(scope="module")
def bench():
    """The scripts as modules; they import each other by name, as they do when they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield {name: importlib.import_module(name) for name in SCRIPTS}
        for name in SCRIPTS:
            del sys.modules[name]


def checked(record: dict, contenders: int) -> dict:
    """The record, after JSON: every figure there, of five runs or more, in order, positive."""
    record = json.loads(json.dumps(record))
    assert record.keys() >= {"comparison", "unit", "device", "date", "cpu", "cores", "capability", "threads", "python",
                             "torch", "peers", "results", "ratios", "facts"}
    assert len(record["results"]) == contenders and [*record["ratios"]] == [*record["results"]][1:]
    for result in record["results"].values():
        assert len(result["runs"]) >= 5 and 0 < result["min"] <= result["median"] <= result["max"]
        assert (min(result["runs"]), max(result["runs"])) == (result["min"], result["max"])
    assert all(0 < ratio["min"] <= ratio["median"] <= ratio["max"] for ratio in record["ratios"].values())
    return record


def test_contenders_take_turns_after_a_round_to_warm_up(bench):
    calls, figures = [], iter([9, 9, 1, 10, 2, 40, 3, 30, 4, 20, 5, 100])

    def measure(name: str):
        return lambda: calls.append(name) or next(figures)

    record = checked(bench["common"].compare("x", "s", {name: measure(name) for name in "ab"}, runs=5, hours=3), 2)
    assert calls == ["a", "b"] * 6
    assert record["results"]["a"] == {"median": 3, "min": 1, "max": 5, "runs": [1, 2, 3, 4, 5]}
    assert record["ratios"]["b"] == {"median": 10, "min": 5, "max": 20}  # run by run
    assert record["facts"] == {"hours": 3} and record["peers"] == {}


@pytest.mark.parametrize("runs, contenders", [(4, {"a": lambda: 1.0}), (5, {})])
def test_too_few(bench, runs, contenders):
    with pytest.raises(ValueError, match="x: at least five runs of one contender"):
        bench["common"].compare("x", "s", contenders, runs=runs)


def test_an_interrupt_leaves_whole_lines(bench, tmp_path):
    def records():
        yield {"comparison": "a"}
        yield {"comparison": "b"}
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted"):
        bench["common"].append(records(), tmp_path / "results.jsonl")
    bench["common"].append([{"comparison": "c"}], tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["comparison"] for line in lines] == ["a", "b", "c"]


def test_without_peers(bench, monkeypatch, capsys):
    """One line for each that is missing, and ours is measured all the same."""
    for name in ("k_diffusion", "diffusers", "librosa"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function in (bench["common"].peer, bench["common"].k_diffusion):
        function.cache_clear()
        monkeypatch.setattr(bench["common"], function.__name__, function)
    try:
        assert [*checked(bench["samplers"].overhead("euler", shape=(1, 1, 4, 4), evaluations=3, runs=5), 2)["results"]
                ] == ["pianodiff", "pianodiff in float64"]
        checked(bench["sound"].spectrogram(length=0.5, runs=5), 1)
        checked(bench["sound"].phase_retrieval(2, length=0.5, runs=5), 1)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("without ")]
        assert [line.split()[1] for line in lines] == ["k-diffusion", "diffusers", "librosa"]
        assert all("pip install" in line for line in lines)
    finally:
        bench["common"].peer.cache_clear()
        bench["common"].k_diffusion.cache_clear()


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own use of numpy
@pytest.mark.parametrize("name", ["heun", "euler", "dpmpp_2m"])
def test_samplers(bench, name):
    if not bench["common"].k_diffusion() or not bench["common"].peer("diffusers", "diffusers"):
        pytest.skip("k-diffusion or diffusers is missing")
    samplers = bench["samplers"]
    record = checked(samplers.overhead(name, shape=(1, 1, 8, 8), evaluations=5, runs=5), 4)
    assert record["peers"].keys() == {"k-diffusion", "diffusers"} and record["unit"] == "µs an evaluation"
    net = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    net.forward = lambda x, c_noise, cond=None: torch.nn.Conv2d.forward(net, x)
    assert checked(samplers.overhead(name, net, shape=(1, 1, 8, 8), evaluations=5, runs=5), 4)["unit"] == "%"


def test_unequal_samplers_are_not_compared(bench, monkeypatch):
    samplers = bench["samplers"]
    contenders = {"pianodiff": samplers.contenders("heun")["pianodiff"]}
    for wrong in (lambda net, z, n: contenders["pianodiff"](net, z, n + 1),  # more evaluations
                  lambda net, z, n: 1.1 * contenders["pianodiff"](net, z, n)):  # another result
        monkeypatch.setattr(samplers, "contenders", lambda name, wrong=wrong: {**contenders, "wrong": wrong})
        with pytest.raises(AssertionError):
            samplers.overhead("heun", shape=(1, 1, 4, 4), evaluations=5, runs=5)


def test_phase_retrieval(bench):
    """The number of ours is the smallest that comes as near as librosa's on every sound."""
    record = checked(bench["sound"].phase_retrieval(4, length=1.0, seeds=(0, 1), runs=5), 2)
    decibels = record["facts"]["decibels"]
    assert all(ours <= theirs < 0 for ours, theirs in zip(decibels["pianodiff"], decibels["librosa"], strict=True))
    assert [*record["results"]][1] == "librosa, 4 iterations" and record["peers"].keys() == {"librosa"}
    assert [bench["sound"].smallest(k.__le__, 5) for k in (0, 3, 5)] == [0, 3, 5]
    with pytest.raises(ValueError, match="nothing to compare"):
        bench["sound"].smallest(lambda n: False, 3)


def test_convergence_is_relative(bench):
    wave = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert bench["sound"].convergence(1.1 * wave, wave) == pytest.approx(-20, abs=0.01)


def test_spectrogram(bench):
    checked(bench["sound"].spectrogram(length=0.5, runs=5), 2)


def test_a_spectrogram_that_is_not_librosas_is_not_compared(bench, monkeypatch):
    monkeypatch.setattr(bench["sound"], "to_spectrogram", lambda wave, cfg: torch.zeros(cfg.n_bins, 31))
    with pytest.raises(AssertionError):
        bench["sound"].spectrogram(length=0.5, runs=5)


def test_network(bench):
    network = bench["network"]
    checked(network.evaluation("tiny", TINY, runs=5), 2)
    assert [*checked(network.arithmetic("tiny", TINY, batches=(1, 2), size=32, runs=5), 3)["results"]
            ] == ["matrix product, 32", "tiny, batch 1", "tiny, batch 2"]
    record = checked(network.sampling("tiny", TINY, batches=(1, 2), runs=5), 2)
    assert record["facts"].keys() == {"sampler", "num_steps"}


def test_generation(bench, monkeypatch):
    generation = bench["generation"]
    settings = {name: {**setting, "num_steps": 1} for name, setting in generation.settings().items()}
    assert [*settings][1] == "heun, 40 steps, guidance 1"
    monkeypatch.setattr(generation, "settings", lambda model: settings)
    piano = generation.Piano.from_pretrained("nano", "cpu")
    checked(generation.real_time(piano, length=0.1, runs=5), len(settings))
    checked(generation.first_sound(runs=5, num_steps=1), 2)


def test_training(bench):
    training = bench["training"]
    assert checked(training.training("tiny", TINY, batch_size=2, num_steps=1, compiled=False, runs=5), 1)["facts"] == {
        "batch_size": 2}
    assert checked(training.preparation(minutes=0.05, count=1, jobs=1, runs=5), 1)["unit"] == "hours/min"


def in_place(measure, work):
    return measure(work)


@pytest.mark.long    # some seconds
def test_growth_of_each_part(bench, tmp_path):
    """Tiny, with a tiny network in place of the presets."""
    growth = bench["growth"]
    parts = {"preparation": (partial(growth.preparation, home=tmp_path, minutes=0.05), 4, (1, 2)),
             "one": (partial(growth.long_recording, home=tmp_path / "long", minutes=0.05), 2, (1, 2)),
             "short": (growth.recordings, 7, (1, 2)),
             "loading": (partial(growth.loading, home=tmp_path, minutes=0.05, count=2), 1, (1, 2)),
             "step": (partial(growth.training, config=TINY), 2, (1, 2)),
             "music": (partial(growth.generation, batch=False, num_steps=1), 2, (1, 2)),
             "pieces": (partial(growth.generation, batch=True, num_steps=1), 2, (1, 2)),
             "reading": (partial(growth.reading, home=tmp_path, minutes=0.05), 2, (1, 2)),
             "distances": (growth.distances, 4, (16, 32)),
             "search": (partial(growth.search, home=tmp_path, minutes=0.05, queries=2), 4, (1, 2))}
    assert {name.split()[0] for name in growth.parts(tmp_path)} >= {"preparation", "short", "loading", "evaluation:"}
    for part, (measure, measures, works) in parts.items():
        record = json.loads(json.dumps(growth.growth(part, "works", measure, works, each=0.5, run=in_place)))
        assert record["work"] == [0.5 * work for work in works] and len(record["measures"]) == measures
        assert all(figure > 0 for measure in record["measures"].values() for figure in measure["figures"])


def test_slopes(bench):
    """Of costs that are known."""
    growth = bench["growth"]
    files = growth.growth("files", "works", lambda work: {"square": 3 * work**2}, (1, 2, 4, 8), run=in_place)
    assert files["measures"] == {"square": {"figures": [3, 12, 48, 192], "slope": 2}}
    assert [growth.remark(slope) for slope in (0.05, 0.5, 1.05, 2)] == [
        "hardly", "more slowly than the work", "", "faster than the work"]
    with pytest.raises(ValueError, match="x: a slope needs two amounts of work, not \\[1\\]"):
        growth.growth("x", "works", lambda work: {"a": 1.0}, (1,), run=in_place)


@pytest.mark.long    # it starts a process, which imports all
def test_each_measurement_has_a_process_of_its_own(bench):
    """What the caller holds does not count in its peak."""
    held = torch.ones(200_000_000)
    found = bench["growth"].apart(partial(bench["growth"].training, config=TINY), 1)
    assert found["peak of memory, MB"] < held.nbytes / 1e6 < bench["growth"].peak()


def test_what_large_data_sets_cost(bench):
    """Computed from what was measured: twice the measured cost is twice theirs."""
    scale = bench["scale"]
    lines = (ROOT / "bench" / "growth.jsonl").read_text().splitlines()
    parts = scale.growths(lines)
    assert scale.growths([*lines, *lines]) == parts
    before = scale.rows(parts, [], 1000, 10_000)
    assert before["blocks in one pass"] == "1,757,812" and before["files or objects in it"] == "230,000"
    assert before["memory for the split (`in_memory`)"] == "57.6 GB"
    parts["preparation"]["measures"]["seconds of a core"]["figures"][-1] *= 2
    after = scale.rows(parts, [], 1000, 10_000)
    assert {name for name in before if before[name] != after[name]} == {
        "preparation, on one core", "preparation, on 16 cores for 24 hours a day"}
    assert [scale.size(value) for value in (0, 999, 12_345, 5.6e15)] == ["0 bytes", "999 bytes", "12.3 kB", "5.6 PB"]
    assert [scale.lasting(value) for value in (1.5, 90, 150, 9000, 3e5, 1e9)] == [
        "1.5 seconds", "90 seconds", "2.5 minutes", "2.5 hours", "3.47 days", "31.7 years"]


def test_the_page_on_scale_is_made_of_the_results(bench):
    page, growth, results = bench["scale"].PAGE.read_text(), *(
        (ROOT / "bench" / f"{name}.jsonl").read_text().splitlines() for name in ("growth", "results"))
    assert bench["scale"].page(page, growth, results) == page, "run python bench/scale.py"


@pytest.mark.long    # some seconds
def test_gpu_on_a_cpu(bench, monkeypatch, capsys):
    gpu = bench["gpu"]
    monkeypatch.setattr(gpu, "append", lambda *given: pytest.fail("a small run was kept"))
    gpu.main(small_=True)
    told = capsys.readouterr().out
    assert re.findall(r"\n(\S+) [^\n]*(?=\(.*median|left out)", told) == [
        "loading", "training", "training", "generation"]


def test_gpu_leaves_out_what_time_or_memory_do_not_hold(bench, capsys):
    gpu = bench["gpu"]
    assert gpu.operations(TINY) == pytest.approx(6 * bench["network"].count(TINY)[1], rel=0.1)
    assert sum(gpu.BUDGETS.values()) <= 330 and gpu.BATCHES.keys() == bench["network"].PRESETS.keys()

    def full():
        raise torch.OutOfMemoryError

    makes = {"a": lambda: {"comparison": "a"}, "b": full, "c": lambda: {"comparison": "c"}}
    assert [*gpu.while_time_lasts(9, makes)] == [{"comparison": "a"}, {"comparison": "c"}]
    assert [*gpu.while_time_lasts(0, makes)] == []
    assert [line.partition(":")[0] for line in capsys.readouterr().out.split("\n\n")] == ["\nb", "a", "b", "c"]


@pytest.mark.long    # it starts processes, which import all
def test_what_takes_too_long_is_ended(bench):
    gpu = bench["gpu"]
    assert gpu.within(300, partial(dict, comparison="a")) == {"comparison": "a"}
    assert gpu.within(300, partial(int, "no number")) is None    # it failed
    assert gpu.within(0.01, partial(time.sleep, 3600)) is None


@pytest.mark.long    # it starts processes, which import all
def test_engines(bench):
    pytest.importorskip("distributed", reason="Dask is missing: pip install -e '.[dask]'")
    record = checked(bench["training"].engines(minutes=0.05, count=2, runs=5), 3)
    assert [*record["results"]] == ["one process", "two processes", "Dask, two workers"]


@pytest.mark.parametrize("value, text", [(0.0123456, "0.0123"), (2.5, "2.5"), (99.96, "100"), (1234.5, "1,234")])
def test_figures_in_the_table(bench, value, text):
    assert bench["table"].figure(value) == text


def test_table(bench):
    """The newest line of each comparison, machine by machine, and the page's other text as it was."""
    common, table = bench["common"], bench["table"]
    old, new, other = (common.compare(name, "s", {"a": lambda v=v: v, "b": lambda v=v: 3 * v}, runs=5)
                       for name, v in (("x", 1.0), ("x", 2.0), ("y", 4.0)))
    gpu = {**new, "device": "cuda", "gpu": "Some GPU", "peers": {"b": "1.2"}}
    made = table.table([json.dumps(record) for record in (old, other, new, gpu)])
    assert made.count("| x, s |") == 2 and made.count("| y, s |") == 1
    assert "| x, s | a: 2 (2–2) | b: 6 (6–6), **3 ×** (3–3) |\n" in made and "a: 1 " not in made
    assert made.index("| x,") < made.index("| y,") < made.index("One Some GPU beside") < made.index("b 1.2: 6 (6–6)")
    assert "twenty seconds" not in made
    for name, told in ((next(iter(bench["generation"].settings())), True), ("heun, 3 steps", False)):
        waits = [common.compare(comparison, "s", {name: lambda v=v: v}, runs=5)
                 for comparison, v in (("generation with nano", 0.168), ("first sound of nano", 0.32))]
        line = "\ntwenty seconds of music take 3.36 s, and the first sound comes after 0.32 s.\n\n| | |"
        assert (line in table.table(map(json.dumps, waits))) is told
    page = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    done = table.update(page, made, "bench")
    assert done == f"before\n<!-- bench -->\n{made}<!-- /bench -->\nafter\n" == table.update(done, made, "bench")
    with pytest.raises(ValueError, match="/bench --> are missing"):
        table.update("no marks", made, "bench")


def test_the_page_is_made_of_the_results(bench):
    page, lines = bench["table"].PAGE.read_text(), (ROOT / "bench" / "results.jsonl").read_text().splitlines()
    for line in lines:
        checked(json.loads(line), len(json.loads(line)["results"]))
    assert bench["table"].update(page, bench["table"].table(lines), "bench") == page, "run python bench/table.py"


def test_what_is_told_of_the_model_is_what_was_measured(bench):
    """And that it would be seen: other figures make another text."""
    card = bench["card"]
    models = card.models()
    before = card.parts(models)
    for path, made in before.items():
        assert bench["table"].update(path.read_text(), made, "models") == path.read_text(), "run python bench/card.py"
    for config, report in models.values():
        config["training"]["images"] += 1000
        report["distances"]["logmel-24x4"]["model"]["frechet"] += 1
    guides = {path for path in before if path.parent.name in card.guides()}    # which have no report
    assert all((made == before[path]) == (path in guides) for path, made in card.parts(models).items())


def test_the_table_tells_what_is_not_made_of_notes_once_all_reports_do(bench):
    card = bench["card"]
    reports = {model: report for model, (_, report) in card.models().items()}
    for own in reports.values():
        own.pop("not_notes", None)
    before = card.music(reports)
    for i, own in enumerate(reports.values()):
        assert card.music(reports) == before
        own["not_notes"] = {row: {"left_over": left + i / 100, "notes": notes}
                            for row, left, notes in (("real", 0.04, 6), ("model", 0.07, 15), ("noise", 0.24, 18))}
    added = [line for line in card.music(reports).splitlines() if line not in before]
    assert [line.split(" | ")[1:] for line in added] == [["0.070", "0.080", "0.040", "0.240 |"],
                                                         ["15.0", "15.0", "6.0", "18.0 |"]]


def test_the_table_tells_how_surely_models_are_told_apart_once_all_reports_do(bench):
    card = bench["card"]
    reports = {model: report for model, (_, report) in card.models().items()}
    for own in reports.values():
        own.pop("told_apart", None)
    before = card.music(reports)
    for i, own in enumerate(reports.values()):
        assert card.music(reports) == before
        aucs = {"real": 0.51, "model": 0.97, "noise": 1}
        own["told_apart"] = {row: {"auc": auc - i / 100} for row, auc in aucs.items()}
    added, = [line for line in card.music(reports).splitlines() if line not in before]
    assert added.split(" | ")[1:] == ["0.97", "0.96", "0.51", "1.00 |"]


def test_a_model_has_seen_what_its_ancestors_saw(bench):
    first = {"images": 1, "seconds": 0}
    training = {"images": 5, "seconds": 1800, "ancestor": {"images": 7, "seconds": 5400, "ancestor": first}}
    assert bench["card"].seen(training) == {"cpu": (13, 2.0)}
    assert bench["card"].history(training) == "13 blocks in 2.0 hours on one core of a shared CPU"
    training = {"images": 20, "seconds": 90, "device": "GPU", "ancestor": training}
    assert bench["card"].seen(training) == {"cpu": (13, 2.0), "GPU": (20, 0.025)}
    assert bench["card"].history(training) == ("33 blocks: 13 in 2.0 hours on one core of a shared CPU, and 20 in "
                                            "2 minutes on one GPU")


def test_the_shapes_compared_cost_about_what_nano_does(bench):
    found = {name: count(shape)[1] for name, shape in bench["shapes"].shapes().items()}
    first, *others = found.values()
    assert first == count(PRESETS["nano"])[1] and all(0.8 * first < macs < 1.5 * first for macs in others)


def test_shapes_are_trained_for_equal_minutes_and_only_once(bench, tmp_path, monkeypatch, capsys):
    shapes, asked = bench["shapes"], []

    def trained(store, run, config):
        asked.append(config.images)
        assert config.unet == TINY and config.decay_fraction > 0
        run.mkdir()
        (run / "log.csv").write_text(f"images,seconds,{','.join(shapes.SIGMAS)}\n8,1,,,,,\n16,60,1,2,3,4,5\n")

    monkeypatch.setattr(shapes, "shapes", lambda: {"one": TINY, "two": TINY})
    monkeypatch.setattr(shapes, "steps", lambda *args, **how: lambda: 10.0)    # blocks a second
    monkeypatch.setattr(shapes, "train", trained)
    for _ in range(2):
        shapes.main(Path("store"), tmp_path / "runs", minutes=0.8)
    header, _, one, two = capsys.readouterr().out.splitlines()[:4]
    assert asked == [480, 480] and header.startswith("| shape | blocks | val_0.1 | val_0.3 |")
    assert one.startswith("| one | 480 | 1 | 2 | 3 |") and two.startswith("| two |")


def test_make_bench_runs_every_script():
    """But for those that measure nothing, and the study of quality by steps."""
    done = subprocess.run(["make", "--dry-run", "--always-make", "bench"], cwd=ROOT, capture_output=True, text=True)
    named = re.search(r"for name in (.*?); do", done.stdout).group(1).split()
    others = {"common", "quality", "notes", "figures", "card", "gpu", "continuation", "shapes"}    # `gpu` is for a GPU
    assert {*named} == {path.stem for path in (ROOT / "bench").glob("*.py")} - others
    assert named[-1] == "table"
