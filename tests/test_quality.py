"""The choice of the sampler's setting (bench/quality.py): the rule, and a whole run with a tiny untrained network."""

import hashlib
import json
from pathlib import Path

import pytest
from test_generate import LARGE, tiny_piano

from pianodiff import SAMPLER
from pianodiff.audio import SPECTROGRAMS, save_audio
from pianodiff.generate import Piano
from pianodiff.model import find_model, noise_levels
from pianodiff.synth import example_performance


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    import quality

    return quality


def table(**ratios: list[tuple[int, float, float]]) -> list[dict]:
    """Settings of each sampler: evaluations, and the upper ends of both intervals; each ratio is 0.1 below its own."""
    return [{"sampler": sampler, "rho": 7.0, "sigma_min": 0.002, "evaluations": n, "frechet_ratio": frechet - 0.1,
             "kernel_ratio": kernel - 0.1, "frechet_ratio_interval": [0.8, frechet],
             "kernel_ratio_interval": [0.8, kernel]}
            for sampler, rows in ratios.items() for n, frechet, kernel in rows]


@pytest.mark.parametrize("rows, chosen", [
    ([(80, -0.7, -2.7, 1.0), (250, -0.1, -0.3, 1.0), (600, 0.0, 0.0, 0.9)], 250),
    ([(80, -0.1, -2.7, 1.0), (250, -0.7, -0.3, 1.0), (600, 0.0, 0.0, 0.9)], 600),  # each has one of the two
    ([(80, -0.7, -2.7, 1.0), (250, -0.1, -0.3, 1.1), (600, 0.0, 0.0, 1.0)], 600),  # as loud, but farther off
    ([(80, -0.1, -0.3, 1.0), (250, -0.1, -0.3, 1.0), (600, 0.0, 0.0, 1.0)], 80),
])
def test_sampling_starts_as_low_as_the_level_allows(quality, rows, chosen):
    starts = [{"sigma_max": sigma, "frechet": frechet, "kernel": 1.0,
               "level_difference_interval": (level - 0.3, level + 0.3),
               "spread_difference_interval": (spread - 0.5, spread + 0.5)} for sigma, level, spread, frechet in rows]
    assert quality.lowest_start(starts, {"frechet": 0.9, "kernel": 0.9})["sigma_max"] == chosen
    near = [row["sigma_max"] for row in starts if abs(sum(row["level_difference_interval"])) < 0.3
            and abs(sum(row["spread_difference_interval"])) < 0.9]
    assert quality.lowest_start(starts, {"frechet": 2.0, "kernel": 2.0})["sigma_max"] == near[0]  # nearer than music


def test_a_setting_that_leaves_noise_between_the_partials_will_not_do(quality):
    rows = table(heun=HEUN, dpmpp_2m=[(12, 1.0, 1.0), (20, 1.0, 1.0)])
    for row, left in zip(rows, (2.0, 1.0, 1.0, 1.2, 1.04), strict=True):
        row |= {"left_over_ratio": left - 0.01, "left_over_ratio_interval": (left - 0.02, left)}
    found = quality.cheapest(rows)
    assert (found["sampler"], found["evaluations"]) == ("dpmpp_2m", 20)
    other = [{**row, "rho": 30.0, "evaluations": 9} for row in rows[-1:]]  # the same, of another schedule
    assert quality.cheapest(rows + other)["rho"] == 30
    other = [{**row, "sigma_min": 0.04, "evaluations": 8} for row in rows[-1:]]  # and one that stops earlier
    assert quality.cheapest(rows + other)["sigma_min"] == 0.04


HEUN = [(9, 1.4, 1.3), (35, 1.02, 1.04), (79, 1.0, 1.0)]


@pytest.mark.parametrize("dpmpp, chosen", [
    ([(5, 1.2, 1.2), (12, 1.01, 1.05), (20, 1.0, 0.9)], ("dpmpp_2m", 12)),
    ([(5, 1.2, 1.2), (12, 1.01, 1.06), (20, 1.0, 0.9)], ("dpmpp_2m", 20)),  # one distance is not enough
    ([(5, 1.0, 1.0), (12, 1.1, 1.0), (20, 1.0, 0.9)], ("dpmpp_2m", 5)),  # 12 is within five per cent, if not surely
    ([(5, 1.0, 1.0), (12, 1.16, 1.0), (20, 1.0, 0.9)], ("dpmpp_2m", 20)),  # 12 is not, and 5 was lucky
    ([(5, 1.0, 1.0), (12, 1.0, 1.0), (20, 1.0, 1.2)], ("heun", 35)),
])
def test_the_cheapest_that_keeps_the_rule_with_all_dearer_ones_is_chosen(quality, dpmpp, chosen):
    found = quality.cheapest(table(heun=HEUN, dpmpp_2m=dpmpp))
    assert (found["sampler"], found["evaluations"]) == chosen


def test_a_distance_below_that_of_real_music_ranks_nothing(quality):
    rows = table(heun=HEUN, dpmpp_2m=[(12, 1.0, 1.3), (20, 1.0, 1.2)])
    for row in rows:
        row |= {"frechet": row["frechet_ratio"], "kernel": 0.01 * row["kernel_ratio"]}
    assert quality.cheapest(rows, {"frechet": 0.5, "kernel": 0.005})["evaluations"] == 35
    assert quality.cheapest(rows, {"frechet": 0.5, "kernel": 0.02})["evaluations"] == 12


def test_the_default_is_the_choice_and_was_measured_with_the_weights_that_ship(quality):
    folder = find_model("nano")
    report = json.loads((folder / "steps.json").read_text())
    assert report["weights"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    choice, guided, steps = report["choice"], report["guidance"], Piano("nano", device="cpu").sampling.num_steps
    assert quality.cheapest(report["settings"], report["controls"]["real"]).items() >= choice.items()
    assert choice["sampler"] == SAMPLER and choice["num_steps"] <= steps  # no dearer setting is worse by the rule
    used = {"num_steps": steps, "rho": choice["rho"], "sigma_min": choice["sigma_min"], "guidance": 1}
    assert guided["settings"][0].items() >= used.items()
    real, config = report["controls"]["real"], json.loads((folder / "config.json").read_text())
    best = quality.cleanest(guided["settings"], real, [report["reference"]["level"], real["level"]])
    assert guided["choice"] == best["guidance"] == config["guidance"] and config["guide"] == "guide"
    assert guided["interval"] == best["interval"] == config["guidance_interval"]
    start = report["sigma_max"]
    assert quality.lowest_start(start["settings"], real)["sigma_max"] == start["choice"]
    levels = {"sigma_min": choice["sigma_min"], "sigma_max": start["choice"], "rho": choice["rho"]}
    assert noise_levels(config) == levels
    assert {row["sigma_max"] for row in report["settings"]} == {start["choice"]}


@pytest.mark.parametrize("rows, chosen", [
    ([(1, 1.0, 1.0, 0.8), (2, 1.0, 1.0, 0.7), (3, 1.04, 1.05, 0.6)], 3),
    ([(1, 1.0, 1.0, 0.8), (2, 1.0, 1.0, 0.7), (3, 1.04, 1.06, 0.6)], 2),  # smoother, and surely no farther: both
    ([(1, 1.0, 1.0, 0.8), (2, 1.0, 1.0, 0.9), (3, 1.0, 1.0, 0.1)], 1),  # 0.1 tells as surely as 0.9
    ([(1, 1.2, 1.0, 0.8), (2, 1.2, 1.0, 0.7)], 1),
])
def test_the_smoothest_guidance_that_keeps_the_distances_is_chosen(quality, rows, chosen):
    settings = [{"guidance": w, "frechet_ratio_interval": [0.8, frechet], "kernel_ratio_interval": [0.8, kernel],
                 "joins": {"flux": flux, "residue": 0.55}} for w, frechet, kernel, flux in rows]
    assert quality.smoothest(settings)["guidance"] == chosen


@pytest.mark.parametrize("rows, chosen", [
    ([(1.0, -24, 1.4, 0.076), (1.2, -23, 1.2, 0.069), (1.4, -21.5, 1.4, 0.066)], 1.4),
    ([(1.0, -24, 1.4, 0.076), (1.2, -23, 1.2, 0.069), (1.4, -20.5, 1.4, 0.066)], 1.2),  # too loud
    ([(1.0, -24, 1.4, 0.076), (1.2, -23, 1.2, 0.069), (1.4, -21.5, 1.6, 0.066)], 1.2),  # too far from music
    ([(1.0, -24, 1.6, 0.076), (1.2, -23, 1.6, 0.069)], 1.0),
])
def test_the_guide_that_leaves_the_least_over_is_chosen(quality, rows, chosen):
    settings = [{"guidance": w, "level": level, "frechet": frechet, "left_over": left}
                for w, level, frechet, left in rows]
    assert quality.cleanest(settings, {"frechet": 1.5}, [-24.4, -22.0])["guidance"] == chosen


@pytest.mark.filterwarnings("ignore:1. clips in 96 dimensions")
def test_a_run_writes_ratios_and_makes_nothing_twice(quality, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "SIGMA_MAX", (80.0, 300.0))
    monkeypatch.setattr(quality, "STARTING", ("dpmpp_2m", 3, 7.0, 0.002))
    monkeypatch.setattr(quality, "LADDER", [("heun", 2, 7.0, 0.002), ("heun", 4, 7.0, 0.002),
                                            ("dpmpp_2m", 4, 12.0, 0.002), ("dpmpp_2m", 4, 12.0, 0.5)])
    monkeypatch.setattr(quality, "BASELINE", ("heun", 4, 7.0, 0.002))
    monkeypatch.setattr(quality, "SOLUTION", ("heun", 4, 7.0, 0.002))
    monkeypatch.setattr(quality, "GUIDANCE_INTERVAL", (0.0, 100.0))  # so few steps pass over the default
    tiny = tiny_piano(SPECTROGRAMS["nano"], LARGE)
    tiny.config["num_steps"] = 2
    tiny.save_pretrained(tmp_path / "tiny")
    (tmp_path / "real").mkdir()
    for seed in range(10):
        save_audio(tmp_path / "real" / f"{seed}.flac", example_performance(4.2 if seed else 2.1, seed))  # one is short

    def run() -> dict:
        quality.main(tmp_path / "real", model=str(tmp_path / "tiny"), pieces=4, seconds=4.1, splits=(), blocks=19,
                     cache=tmp_path / "cache")
        return json.loads((tmp_path / "tiny" / "steps.json").read_text())

    first = run()
    printed = capsys.readouterr().out.splitlines()
    heun_2, heun_4, dpmpp, earlier = first["settings"]
    assert [row["evaluations"] for row in first["settings"]] == [3, 7, 4, 4] and first["blocks"] == 8
    assert (dpmpp["sigma_min"], earlier["sigma_min"]) == (0.002, 0.5) and dpmpp["rms_db"] != earlier["rms_db"]
    assert heun_4["frechet_ratio"] == heun_4["kernel_ratio"] == 1 and heun_4["frechet_ratio_interval"] == [1, 1]
    assert heun_4["rms_db"] == 0 < dpmpp["rms_db"] < heun_2["rms_db"]
    assert heun_2["frechet_ratio"] == pytest.approx(heun_2["frechet"] / heun_4["frechet"]) != 1
    assert 0 < first["controls"]["real"]["kernel"] < first["controls"]["noise"]["kernel"]
    loud = example_performance(4.2, 0)[None] / 2
    assert quality.level_of(10 * loud) == pytest.approx(quality.level_of(loud) + 20)
    assert len({heun_2["level"], heun_4["level"], first["reference"]["level"]}) == 3
    low, high = first["sigma_max"]["settings"]
    assert (low["sigma_max"], high["sigma_max"]) == (80, 300) and low["spread"] != high["spread"] > 0
    assert high["level_difference_interval"] == high["spread_difference_interval"] == [0, 0]
    assert low["level_difference_interval"][0] < low["level_difference_interval"][1]
    assert set(heun_4["joins"]) >= {"flux", "residue"} and 0 <= heun_4["joins"]["flux"] <= 1
    weights = (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert first["weights"] == hashlib.sha256(weights).hexdigest()
    guided = first["guidance"]["settings"]
    assert [row["guidance"] for row in guided] == [1, *quality.GUIDANCE] and guided[0] in first["settings"]
    assert "left_over" not in heun_2  # without a soundfont there is no ruler of notes
    assert len({row["frechet"] for row in guided}) == 4 and len({row["sampler"] for row in guided}) == 1
    assert printed[-1].endswith(f"{first['choice']['evaluations']} evaluations; then guidance "
                                f"{first['guidance']['choice']:g} from {first['guidance']['interval'][0]:g} to "
                                f"{first['guidance']['interval'][1]:g}")

    monkeypatch.setattr(Piano, "spectrograms", None)  # all is in the cache
    again = run()
    assert all(again[part] == first[part] for part in ("settings", "guidance", "controls"))
