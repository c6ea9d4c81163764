"""Settings, learning rate, average, batches and held-out blocks: pure functions of settings, seed and step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, SPECTROGRAM, chords
from test_unet import awake
from torch import nn

from pianodiff.audio import SpectrogramConfig, to_spectrogram
from pianodiff.data import BlockDataset, prepare
from pianodiff.edm import Denoiser, edm_loss
from pianodiff.recipe import (
    EVAL_SIGMAS,
    LABELS,
    WAYS,
    PowerEMA,
    TrainConfig,
    adamw,
    augment,
    draw_batch,
    draw_changes,
    draw_noise,
    fastest,
    hold_out,
    learning_rate,
    recolour,
    standardise,
    training_loss,
    use_bf16,
)
from pianodiff.unet import UNet


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> BlockDataset:
    folder = tmp_path_factory.mktemp("recipe")
    prepare(chords(folder / "wav", 4), folder / "store", SPECTROGRAM, jobs=1)
    return BlockDataset(folder / "store", "train", random_offset=True, in_memory=True)


@pytest.mark.parametrize("wrong, message", [
    ({"images": 0}, "images must be positive, not 0"), ({"lr": float("nan")}, "lr must be"),
    ({"accumulate": 0}, "accumulate must be positive, not 0"),
    ({"accumulate": 1.5}, "accumulate must be a whole number"),
    ({"cond_dropout": 2}, "cond_dropout must lie between 0 and 1"), ({"seed": -1}, "seed must"),
    ({"unet": None, "preset": "x"}, "no preset 'x'; choose"), ({"P_mean": float("nan")}, "P_mean must be finite"),
    ({"betas": (0.9, 1)}, "betas must be"), ({"betas": (-0.1, 0.9)}, "betas must be"),
    ({"betas": (0.9,)}, "betas must be two"),
    ({"ema_std": 0.5}, "ema_std must lie"), ({"ema_std": 0}, "ema_std must lie"),
    ({"batch_size": 4.5}, "batch_size must be a whole number, not 4.5"), ({"seed": 1.5}, "seed must be a whole"),
    ({"recolour": 1.5}, "recolour must lie between 0 and 1, not 1.5"),
    ({"recolour": float("nan")}, "recolour must lie"),
    ({"label_dropout": -0.1}, "label_dropout must lie between 0 and 1, not -0.1"),
    ({"unet": replace(CONFIG.network, labels=3)}, "unet.labels must be 0 or 16, not 3"),
    ({"workers": float("nan")}, "workers must be a"), ({"checkpoint_seconds": 0}, "checkpoint_seconds must"),
])
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)


def test_the_learning_rate_rises_stays_and_falls():
    config = TrainConfig(images=1000, lr=0.5, warmup_images=100, decay_fraction=0.25)
    rates = [learning_rate(config, images) for images in (0, 50, 100, 750, 875, 1000, 2000)]
    assert rates == [0, 0.25, 0.5, 0.5, 0.25, 0, 0]


def test_the_average_of_constant_weights_is_their_value():
    net = nn.Linear(2, 2)
    ema = PowerEMA(net, 0.08)
    nn.init.constant_(net.weight, 3.0)
    for step in range(1, 6):
        ema.update(net, step)
    assert torch.equal(ema.net.weight, net.weight) and not ema.net.weight.requires_grad


def test_vectors_do_not_decay():
    groups = adamw(nn.Linear(3, 2), TrainConfig(weight_decay=0.5)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.5, [2]), (0, [1])]


def labels(**values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name.replace(" ", "_"), 0.0) for name in LABELS]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CFG = SpectrogramConfig()


def test_a_change_of_nothing_changes_nothing():
    spec = torch.rand(2, 1, 256, 8, generator=seeded(0))
    still = labels(wet=0.5, reverberation=2.0, unknown=1.0, noise_tilt=-1.0).expand(2, -1)
    assert torch.equal(recolour(spec, still, CFG, seeded(0)), spec)


def test_gain_tilt_and_bands_move_pixels_by_decibels():
    spec = torch.full((1, 1, 256, 2), 0.5)
    spec[..., 1] = 0

    def moved(**values):
        changed = recolour(spec, labels(**values), CFG, seeded(0))
        assert not changed[..., 1].any()  # the floor stays
        return 80 * (changed[0, 0, :, 0] - 0.5)

    torch.testing.assert_close(moved(gain=-0.5), torch.full((256,), -5.0))
    torch.testing.assert_close(moved(tilt=0.5)[[16, 32, 64, 128]], torch.tensor([-1.0, 0, 1, 2]), atol=1e-4, rtol=0)
    bands = {f"{hz}_Hz": float(i) for i, hz in enumerate((125, 250, 500, 1000, 2000, 4000))}
    torch.testing.assert_close(moved(**bands)[[0, 8, 16, 64, 255]], torch.tensor([0.0, 0, 3, 9, 15]), atol=0.03, rtol=0)
    assert recolour(torch.full((1, 1, 256, 1), 0.95), labels(gain=1.0), CFG, seeded(0)).max() == 1
    assert recolour(torch.full((1, 1, 256, 1), 0.05), labels(gain=-1.0), CFG, seeded(0)).max() == 0


def test_noise_and_hum_add_power():
    spec, level = torch.zeros(2, 1, 256, 400), 30 / 35
    noisy = recolour(spec, labels(noise=level).expand(2, -1), CFG, seeded(0))
    power = 10 ** (8 * (noisy - 1))
    assert power.mean() == pytest.approx(1e-5, rel=0.02)  # -50 dBFS
    assert power[:, :, 1:].std() == pytest.approx(1e-5, rel=0.05)  # as an exponential distribution has
    assert (noisy[0] - noisy[1]).abs().mean() > 0.01
    assert torch.equal(noisy, recolour(spec, labels(noise=level).expand(2, -1), CFG, seeded(0)))
    tilted = recolour(spec, labels(noise=level, noise_tilt=-0.5).expand(2, -1), CFG, seeded(0))
    torch.testing.assert_close((80 * (tilted - noisy))[:, 0, [32, 64, 128]].mean((0, 2)), torch.tensor([0.0, -2, -4]),
                               atol=0.1, rtol=0)
    for mains in (50, 60):
        hum = recolour(spec[:1], labels(**{f"hum_of_{mains}_Hz": 40 / 45}), CFG, seeded(0))[0, 0, :, 0]
        seconds = torch.arange(8000) / 8000
        tones = sum((2 * torch.pi * h * mains * seconds + h).sin() / h for h in range(1, 9))
        heard = to_spectrogram(0.01 * tones, CFG)[:, 8:-8]  # -40 dBFS
        mean = 1 + torch.log10((10 ** (8 * (heard - 1))).mean(1)) / 8
        loud = mean > 0.2
        torch.testing.assert_close(hum[loud], mean[loud], atol=0.02, rtol=0)


def test_changes_are_a_function_of_seed_and_step_and_may_be_withheld():
    config = replace(CONFIG, batch_size=3000, recolour=0.6, label_dropout=0.2)
    change, withheld = draw_changes(config, 7)
    for again, same in ((config, 7), (replace(config, label_dropout=0.9), 7)):
        assert torch.equal(draw_changes(again, same)[0], change)
    for other in ((config, 8), (replace(config, seed=1), 7)):
        assert not torch.equal(draw_changes(*other)[0], change)
    some = change != 0
    assert abs(some.any(1).float().mean() - 0.6 * 31 / 32) < 0.05 and abs(withheld.float().mean() - 0.2) < 0.05
    assert not draw_changes(replace(config, recolour=0.0), 7)[0].any() and not change[:, -4:].any()
    parts = {"gain": (-1, 1), "tilt": (-1, 1), "noise": (1 / 7, 1), "noise tilt": (-1, 0), "hum of 50 Hz": (1 / 9, 1),
             "hum of 60 Hz": (1 / 9, 1)}
    for name, (low, high) in parts.items():
        drawn = change[:, LABELS.index(name)]
        drawn = drawn[drawn != 0]
        assert low <= drawn.min() < low + 0.05 and high - 0.05 < drawn.max() <= high
    assert not (some[:, 10] & some[:, 11]).any() and torch.equal(some[:, 8], some[:, 9])


def test_a_batch_is_changed_and_its_labels_tell(data, monkeypatch):
    """The blocks, offsets and dropout stay; block and predecessor are changed alike."""
    monkeypatch.setattr(data, "stage", lambda index: (0.5, 1.5, True))
    config = replace(CONFIG, batch_size=32, recolour=0.5, label_dropout=0.25)
    plain, batch = (draw_batch(data, len(data), some, 3) for some in (replace(config, recolour=0.0), config))
    change, withheld = draw_changes(config, 3)
    assert plain.keys() == {"spec", "prev", "has_prev"} and batch.keys() == {*plain, "labels"}
    assert torch.equal(batch["has_prev"], plain["has_prev"]) and 0 < withheld.sum() < 32
    assert batch["spec"].dtype == torch.uint8 and batch["spec"].stride() == plain["spec"].stride()
    told = change.clone()
    told[:, -4:] = torch.tensor([0.5, 1.5, 1, 0])
    told[withheld] = labels(unknown=1.0)
    assert torch.equal(batch["labels"], told)
    colours = change.clone()
    colours[:, 8:] = 0  # without what is random
    for key in ("spec", "prev"):
        same = (batch[key] == plain[key]).flatten(1).all(1)
        assert torch.equal(same | change.any(1), torch.ones(32, dtype=torch.bool)) and not same.all()
        coloured = (recolour(plain[key] / 255, colours, data.info.cfg, seeded(0)) * 255).round()
        quiet = ~change[:, 8:].any(1)
        assert torch.equal(batch[key][quiet], coloured[quiet].byte())
        assert (batch[key] >= coloured)[change[:, 8:].any(1)].all()


def test_a_network_with_labels_is_told_where_the_validation_is_played(data, monkeypatch):
    monkeypatch.setattr(BlockDataset, "stage", lambda self, index: (0.1 * index, 0.5, index % 2 == 1))
    plain, told = (hold_out(data, replace(CONFIG, recolour=share)).blocks for share in (0.0, 0.5))
    assert plain.keys() == {"spec", "prev", "has_prev"} and all(torch.equal(told[key], plain[key]) for key in plain)
    wet, seconds, other = told["labels"][:, 12:15].T
    indices = (wet * 10).round().int()
    assert told["labels"].shape == (len(plain["spec"]), 16) and (seconds == 0.5).all() and wet.any()
    assert torch.equal(other, (indices % 2).float()) and not told["labels"][:, [*range(12), 15]].any()


def test_labels_reach_the_network(data):
    config = replace(CONFIG, batch_size=8, recolour=1.0)
    net = UNet(config.network)
    batch = draw_batch(data, len(data), config, step=0) | draw_noise(config)
    assert config.network == replace(CONFIG.network, labels=len(LABELS))
    awake(net)  # what starts at zero would hide the rest
    nn.init.zeros_(net.labels.weight)
    training_loss(Denoiser(net), batch, data.info.mean, data.info.std).backward()
    assert torch.equal(net.labels.weight.grad.any(0), batch["labels"].any(0))


def test_each_block_comes_once_an_epoch(data, monkeypatch):
    config, seen, codes = replace(CONFIG, batch_size=2, cond_dropout=0.0), [], data.codes
    monkeypatch.setattr(data, "codes", lambda index, offset: seen.append(index) or codes(index, offset))
    count = len(data) // 2 * 2
    for step in range(count // 2):
        for rank in range(2):
            assert draw_batch(data, count, config, step, rank, 2)["spec"].shape == (1, 1, 32, 32)
    assert sorted(seen) == list(range(count)) and seen != sorted(seen)


def test_shares_of_a_batch_make_up_the_whole(data):
    """Offsets, blocks and dropout are drawn for all, whatever the number of processes."""
    config = replace(CONFIG, batch_size=12, cond_dropout=0.5, recolour=0.8)
    for step in range(4):
        whole = draw_batch(data, 10, config, step)
        for world in (2, 3, 12):
            shares = [draw_batch(data, 10, config, step, rank, world) for rank in range(world)]
            assert all(torch.equal(torch.cat([share[key] for share in shares]), whole[key]) for key in whole)


def test_held_out_blocks_are_shared_and_the_same(data):
    whole, halves = hold_out(data, CONFIG), [hold_out(data, CONFIG, rank, 2) for rank in range(2)]
    assert (whole.split, whole.training_blocks, len(whole.noise)) == ("validation", len(data), CONFIG.eval_blocks)
    for rank, half in enumerate(halves):
        assert torch.equal(half.noise, whole.noise[rank::2])
        assert all(torch.equal(half.blocks[key], whole.blocks[key][rank::2]) for key in whole.blocks)


def test_without_a_validation_split_the_last_blocks_are_held_out(tmp_path: Path):
    prepare(chords(tmp_path / "wav", 1), tmp_path / "store", SPECTROGRAM, jobs=1)
    data = BlockDataset(tmp_path / "store", "train", random_offset=False)
    held = hold_out(data, CONFIG)
    assert held.split == "train" and held.training_blocks == len(data) - len(held.noise) < len(data)
    last = torch.from_numpy(data.codes(len(data) - 1)["spec"]).mT
    assert torch.equal(held.blocks["spec"][-1, 0], last)


def test_the_loss_is_a_function_of_the_seed(data):
    net, batch = Denoiser(UNet(CONFIG.network)), draw_batch(data, len(data), CONFIG, step=0)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(training_loss(net, batch | draw_noise(CONFIG), data.info.mean, data.info.std).item())
    assert losses[0] == losses[1] != losses[2] and 0.3 < losses[0] < 3


def test_levels_take_the_place_of_what_is_drawn(data):
    drawn = []
    for seed in range(20):
        torch.manual_seed(seed)
        plain = draw_noise(CONFIG)
        torch.manual_seed(seed)
        few = draw_noise(CONFIG, levels=[9.0, 0.5])
        drawn.append(float(few["sigma"][0]))
        assert (few["sigma"] == drawn[-1]).all() and few["sigma"].shape == plain["sigma"].shape
        assert all(torch.equal(few[key], plain[key]) for key in ("faults", "noise"))
    assert set(drawn) == {9.0, 0.5}


def test_noise_is_that_of_0_1_0(data):
    """Which drew it while it computed the loss, in this order: its runs go on, bit for bit."""
    net, batch = Denoiser(UNet(CONFIG.network)), draw_batch(data, len(data), CONFIG, step=0)
    torch.manual_seed(7)
    mine = training_loss(net, batch | draw_noise(CONFIG), data.info.mean, data.info.std)
    torch.manual_seed(7)
    y, (prev, has_prev) = standardise(batch, data.info.mean, data.info.std)
    cond = augment(prev, CONFIG.cond_noise), has_prev
    assert torch.equal(mine, edm_loss(net, y, cond, P_mean=CONFIG.P_mean, P_std=CONFIG.P_std).mean())


def test_blocks_in_bytes_are_standardised_as_numbers():
    codes = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    has_prev = torch.tensor([True, False])
    y, (prev, same) = standardise({"spec": codes, "prev": codes, "has_prev": has_prev}, 0.4, 0.2)
    torch.testing.assert_close(y, (codes / 255 - 0.4) * 2.5)
    assert torch.equal(prev, y) and same is has_prev
    assert torch.equal(standardise({"spec": codes / 255, "prev": codes, "has_prev": has_prev}, 0.4, 0.2)[0], y)


NO, NO_MATH, BF16, BF16_MATH = WAYS


@pytest.mark.parametrize("seconds, best, steps", [
    ({NO: 1, NO_MATH: 1.1, BF16: 0.8, BF16_MATH: 0.5}, BF16_MATH, 13),
    ({NO: 1, NO_MATH: 0.9, BF16: 2.1, BF16_MATH: 0.1}, NO_MATH, 8),    # where bf16 is emulated it's tried once
    ({NO: 1, NO_MATH: 3, BF16: 0.9, BF16_MATH: 0.96}, BF16, 11),
    ({NO: 1, NO_MATH: 0.97, BF16: 0.96, BF16_MATH: 2}, NO, 13),        # that is chance
])
def test_the_fastest_way_is_found(seconds, best, steps):
    tried = []
    assert fastest(lambda way: tried.append(way) or seconds[way]) == best
    assert len(tried) == steps


def test_the_fastest_step_counts_and_the_first_does_not():
    times = {NO: iter([9, 1, 3, 1]), BF16: iter([0.1, 0.8, 2])}
    assert fastest(lambda way: next(times[way]), (NO, BF16)) == BF16


def test_a_way_sets_the_precision_and_the_kernel():
    x, linear = torch.ones(1, 1, 4, 4, requires_grad=True), nn.Linear(4, 4)
    for way in WAYS:
        with way.on(torch.device("cpu")):
            assert linear(x).dtype == (torch.bfloat16 if way.precision == "bf16" else torch.float32)
            attention = nn.functional.scaled_dot_product_attention(x, x, x)
        flash = "FlashAttention" in type(attention.grad_fn).__name__
        assert flash == (way.attention == "default")
    assert torch.backends.cuda.flash_sdp_enabled()


def test_precision_is_as_set():
    cpu = torch.device("cpu")
    assert use_bf16(TrainConfig(mixed_precision="bf16"), cpu) and not use_bf16(TrainConfig(mixed_precision="no"), cpu)
    assert len(EVAL_SIGMAS) == 9
