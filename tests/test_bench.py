"""The comparisons of bench/, tiny: what they record, not how long anything takes. The book's tables are made of it."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pianodiff.unet import UNetConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("common", "samplers", "sound", "network", "generation", "training", "table", "card")
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
    monkeypatch.setattr(generation, "settings", lambda: settings)
    piano = generation.Piano.from_pretrained("nano", "cpu")
    checked(generation.real_time(piano, length=0.1, runs=5), len(settings))
    checked(generation.first_sound(runs=5, num_steps=1), 2)


def test_training(bench):
    training = bench["training"]
    assert checked(training.training("tiny", TINY, batch_size=2, num_steps=1, compiled=False, runs=5), 1)["facts"] == {
        "batch_size": 2}
    assert checked(training.preparation(minutes=0.05, count=1, jobs=1, runs=5), 1)["unit"] == "hours/min"


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
    assert all(made != before[path] for path, made in card.parts(models).items())


def test_a_model_has_seen_what_its_ancestors_saw(bench):
    first = {"images": 1, "seconds": 0}
    training = {"images": 5, "seconds": 1800, "ancestor": {"images": 7, "seconds": 5400, "ancestor": first}}
    assert bench["card"].seen(training) == {"cpu": (13, 2.0)}
    assert bench["card"].history(training) == "13 blocks in 2.0 hours on one core of a shared CPU"
    training = {"images": 20, "seconds": 90, "device": "GPU", "ancestor": training}
    assert bench["card"].seen(training) == {"cpu": (13, 2.0), "GPU": (20, 0.025)}
    assert bench["card"].history(training) == ("33 blocks: 13 in 2.0 hours on one core of a shared CPU, then 20 in "
                                            "2 minutes on one GPU")


def test_make_bench_runs_every_script():
    """But for those that measure nothing, and the study of quality by steps."""
    done = subprocess.run(["make", "--dry-run", "--always-make", "bench"], cwd=ROOT, capture_output=True, text=True)
    named = re.search(r"for name in (.*?); do", done.stdout).group(1).split()
    others = {"common", "quality", "notes", "figures", "card"}
    assert {*named} == {path.stem for path in (ROOT / "bench").glob("*.py")} - others
    assert named[-1] == "table"
