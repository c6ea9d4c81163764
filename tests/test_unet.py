"""The network, its parts and its configurations."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pianodiff.model import PRESETS
from pianodiff.unet import Attention, NoiseEmbedding, ResidualBlock, SpectrogramEmbedding, UNet, UNetConfig

PLAIN = UNetConfig(n_bins=32, n_frames=16, channels=(8, 12, 16), blocks=(1, 2, 1), attention=("", "t", "ft"),
                   emb_channels=24, cond_channels=(8, 8))
OURS = replace(PLAIN, n_bins=64, n_frames=32, patch=2, channels=(8, 64), blocks=(2, 1), attention=("f+t", "ft"),
               adaptive=True, coordinates=True, context=8, seam=4)
BOTH = pytest.mark.parametrize("config", [PLAIN, OURS], ids=["plain", "ours"])


def awake(net: nn.Module) -> nn.Module:
    """What starts at zero would hide the rest."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def network(config: UNetConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return awake(UNet(config)).double().eval()


def blocks(config: UNetConfig, batch: int = 3, seed: int = 1) -> Tensor:
    shape = (batch, 1, config.n_bins, config.n_frames)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


C_NOISE = torch.tensor([-1.5, 0.0, 1.1], dtype=torch.float64)
SOME = torch.tensor([True, False, True])


# the forward pass

@BOTH
def test_fresh_network_answers_zero(config):
    x = blocks(config).float()
    assert not UNet(config)(x, C_NOISE, x).any()


@BOTH
def test_every_parameter_learns(config):
    net, x = network(config), blocks(config)
    net(x, C_NOISE, (x.flip(0), SOME)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@BOTH
def test_float32_agrees_with_float64(config):
    net, x = network(config), blocks(config)
    wide = net(x, C_NOISE, x.flip(0)).detach()
    assert wide.dtype == torch.float64 and wide.std() > 0.1
    narrow = net.float()(x.float(), C_NOISE, x.float().flip(0)).detach()  # c_noise comes in any precision
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-4)


@BOTH
def test_channels_last_computes_the_same(config):
    net, x = network(config).requires_grad_(False), blocks(config)
    expected = net(x, C_NOISE, (x.flip(0), SOME))
    net.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, C_NOISE, (x.flip(0), SOME)), expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_blocks_of_a_batch_are_independent(config):
    net, x, past = network(config), blocks(config), blocks(config, seed=2)
    together = net(x, C_NOISE, (past, SOME))
    alone = [net(x[i : i + 1], C_NOISE[i : i + 1], past[i : i + 1] if SOME[i] else None) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


@BOTH
def test_forms_of_the_condition(config):
    net, x, past = network(config), blocks(config), blocks(config, seed=2)
    full, none = net(x, C_NOISE, past), net(x, C_NOISE)
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(net(x, C_NOISE, (past, yes)), full) and torch.equal(net(x, C_NOISE, None), none)
    assert torch.equal(net(x, C_NOISE, (past, no)), none)  # what is there is not looked at
    some = net(x, C_NOISE, (past, SOME))
    torch.testing.assert_close(some, torch.where(SOME[:, None, None, None], full, none), rtol=1e-10, atol=1e-12)


@BOTH
def test_what_it_is_told_matters(config):
    net, x, past = network(config), blocks(config), blocks(config, seed=2)
    answer = net(x, C_NOISE, past)
    for other in ((x, C_NOISE + 0.1, past), (x, C_NOISE, past.flip(3)), (x, C_NOISE, None), (x.flip(2), C_NOISE, past)):
        assert (net(*other) - answer).abs().amax((1, 2, 3)).min() > 1e-3
    assert (net(x, C_NOISE, 0 * past) - net(x, C_NOISE)).abs().max() > 1e-3  # a silent block is not the same as none


def test_the_end_of_the_block_before_stands_before_the_block():
    net, x, past, seen = network(OURS), blocks(OURS), blocks(OURS, seed=2), []
    net.stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert net(x, C_NOISE, (past, SOME)).shape == x.shape
    there, picture = SOME[:, None, None, None], F.pixel_shuffle(seen[0][:, :4], 2)
    assert torch.equal(picture[..., 8:], x)
    assert torch.equal(picture[..., :8], torch.where(there, 2 * past[..., -8:], 0))
    assert torch.equal(seen[0][:, 4:, :, :4], there.double().expand(-1, 1, 32, 4)) and not seen[0][:, 4:, :, 4:].any()


@BOTH
def test_encoded_once_is_the_same(config):
    net, x, past = network(config), blocks(config), blocks(config, seed=2)
    for cond in ((past, SOME), past, None):
        encoded = net.encode(cond, len(x))
        assert torch.equal(net(x, C_NOISE, encoded), net(x, C_NOISE, cond)) and net.encode(encoded) is encoded
        assert encoded.columns.shape == (3, 1, config.n_bins, config.context)


@pytest.mark.parametrize("x, past", [
    ((3, 1, 32, 8), None), ((3, 2, 32, 16), None), ((3, 1, 16, 32), None), ((3, 32, 16), None),
    ((3, 1, 32, 16), (3, 1, 32, 8)), ((3, 1, 32, 16), (1, 1, 32, 16)),
])
def test_other_shapes_are_refused_in_one_line(x, past):
    with pytest.raises(ValueError, match=r"takes blocks \[B, 1, 32, 16\], not \[3, ") as caught:
        UNet(PLAIN)(torch.zeros(x), torch.zeros(3), past and torch.zeros(past))
    assert "\n" not in str(caught.value)


@BOTH
def test_labels_of_zero_change_nothing(config):
    """Not a bit, and not the other weights of a seed: networks without labels go on with them."""
    net, x, past = UNet(config), blocks(config), blocks(config, seed=2)
    torch.manual_seed(0)
    first = UNet(config).state_dict()
    torch.manual_seed(0)
    second = UNet(replace(config, labels=3)).state_dict()
    assert not second.pop("labels.weight").any() and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    net, labelled = network(config), network(replace(config, labels=3))
    labelled.load_state_dict(net.state_dict(), strict=False)
    assert labelled.labels.weight.any()
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    for cond in ((past, SOME), past, None, net.encode((past, SOME))._replace(labels=None)):
        assert torch.equal(labelled(x, C_NOISE, cond), net(x, C_NOISE, cond))
    assert torch.equal(labelled(x, C_NOISE, (past, SOME, zeros)), net(x, C_NOISE, (past, SOME)))


def test_a_seam_corrects_the_first_columns_by_the_last_ones_before():
    plain, net = network(replace(OURS, seam=0)), network(OURS)
    plain.load_state_dict({name: w for name, w in net.state_dict().items() if not name.startswith("seam.")})
    x, past = blocks(OURS), blocks(OURS, seed=2)
    encoded = net.encode((past, SOME))
    added = net(x, C_NOISE, encoded) - plain(x, C_NOISE, encoded)
    assert not added[..., 4:].any() and not added[~SOME].any() and added[SOME][..., :4].abs().min() > 0
    assert torch.equal(net(x, C_NOISE, None), plain(x, C_NOISE, None))
    answer, emb = blocks(OURS, seed=3), torch.randn(len(x), 24, dtype=x.dtype)
    corrected = net.seam(answer, x, emb, encoded)
    unseen = past.clone()  # but for the 4 columns beside the join, nothing counts
    unseen[..., :-4] = 9
    far_x, far_answer = x.clone(), answer.clone()
    far_x[..., 4:], far_answer[..., 4:] = 9, 9
    other = net.seam(far_answer, far_x, emb, net.encode((unseen, SOME)))
    assert torch.equal(other[..., :4], corrected[..., :4])


def test_a_seam_starts_as_nothing_and_leaves_the_other_weights_of_a_seed():
    torch.manual_seed(0)
    first = UNet(replace(OURS, labels=3, seam=0)).state_dict()
    torch.manual_seed(0)
    second = UNet(replace(OURS, labels=3)).state_dict()
    assert not second["seam.conv2.weight"].any() and not second["seam.conv2.bias"].any()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.partition(".")[0] for name in second.keys() - first.keys()} == {"seam"}


@BOTH
def test_labels_are_heard_block_by_block(config):
    net, x, past = network(replace(config, labels=3)), blocks(config), blocks(config, seed=2)
    labels = torch.eye(3, dtype=torch.float64) * torch.tensor([1, 0, -2])
    answer, plain = net(x, C_NOISE, (past, SOME, labels)), net(x, C_NOISE, (past, SOME))
    assert ((answer - plain).abs().amax((1, 2, 3)) > 1e-3).tolist() == [True, False, True]
    assert torch.equal(net(x, C_NOISE, net.encode((past, SOME), labels=labels)), answer)
    assert torch.equal(net(x, C_NOISE, net.encode(None, 3, labels)), net(x, C_NOISE, (past, ~SOME & SOME, labels)))
    nn.init.zeros_(net.labels.weight)
    net(x, C_NOISE, (past, SOME, labels)).square().sum().backward()
    assert (net.labels.weight.grad.any(0) == labels.any(0)).all()  # from nothing, it learns


@pytest.mark.parametrize("labels, config", [((3, 2), OURS), ((3, 2), replace(OURS, labels=3)),
                                            ((2, 3), replace(OURS, labels=3))])
def test_other_labels_are_refused_in_one_line(labels, config):
    net, x = network(config), blocks(config)
    message = rf"takes labels \[B, {config.labels}\], not \[{labels[0]}, {labels[1]}\] for 3 blocks$"
    for cond in ((x, SOME, torch.zeros(labels)), net.encode(x, labels=torch.zeros(labels))):
        with pytest.raises(ValueError, match=message):
            net(x, C_NOISE, cond)


def test_the_same_seed_makes_the_same_network():
    first, again, other = (network(OURS, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


# its parts

def test_noise_levels_are_told_apart():
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 200)
    e = NoiseEmbedding(32)(sigma.log() / 4)
    assert e.shape == (200, 32) and torch.equal(e, NoiseEmbedding(32)(sigma.log() / 4))
    torch.testing.assert_close(e.square().sum(1), torch.full((200,), 16.0))
    apart = torch.cdist(e, e) + 9 * torch.eye(200)
    assert apart.min() > 0.3
    assert torch.cdist(e[:1], e)[0, 100:].min() > 3  # and those far apart by more


def test_residual_block_is_equation_residual():
    torch.manual_seed(0)
    x, emb, block = torch.randn(2, 8, 4, 4), torch.randn(2, 6), awake(ResidualBlock(8, 12, 6, adaptive=False))
    h = F.conv2d(F.silu(F.group_norm(x, 2, block.norm0.weight, block.norm0.bias, 1e-6)), block.conv0.weight,
                 block.conv0.bias, padding=1)
    h = h + (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, 3, block.norm1.weight, block.norm1.bias, 1e-6))
    torch.testing.assert_close(block(x, emb), (block.skip(x) + block.conv1(h)) / math.sqrt(2))


def test_adaptive_block_scales_and_shifts():
    torch.manual_seed(0)
    x, emb, block = torch.randn(2, 8, 4, 4), torch.randn(2, 6), awake(ResidualBlock(8, 8, 6, adaptive=True))
    scale, shift = block.affine(emb)[:, :8], block.affine(emb)[:, 8:]
    h = block.norm1(block.conv0(F.silu(block.norm0(x))))
    h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(block(x, emb), (x + block.conv1(F.silu(h))) / math.sqrt(2))


@pytest.mark.parametrize("axis", ["f", "t", "ft"])
def test_attention_is_equation_attention(axis):
    torch.manual_seed(0)
    attention, x = awake(Attention(64, axis)).double(), torch.randn(2, 64, 6, 5, dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, 2, 32, 6, 5).unbind(1)
    scores = torch.einsum("bhcft,bhcgs->bhftgs", q, k) / math.sqrt(32)
    rows, columns = (torch.eye(n, dtype=torch.bool) for n in (6, 5))
    if axis == "f":  # of one instant
        scores = scores.masked_fill(~columns[None, :, None, :], -math.inf)
    elif axis == "t":
        scores = scores.masked_fill(~rows[:, None, :, None], -math.inf)
    weights = scores.flatten(4).softmax(-1).unflatten(4, (6, 5))
    mixed = torch.einsum("bhftgs,bhcgs->bhcft", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), (x + attention.out(mixed)) / math.sqrt(2))


def test_spectrogram_embedding_hears_all_of_it():
    torch.manual_seed(0)
    past = blocks(OURS, 2).requires_grad_()
    vector = SpectrogramEmbedding(OURS).double()(past)
    assert vector.shape == (2, OURS.emb_channels)
    vector[0].square().sum().backward()
    assert past.grad[0].all() and not past.grad[1].any()


# configurations

@pytest.mark.parametrize("change, message", [
    ({"channels": (8, 12)}, "one entry for each resolution"), ({"attention": ("", "")}, "one entry"),
    ({"channels": (), "blocks": (), "attention": ()}, "one entry"),
    ({"channels": (8, 12, 6)}, "6 channels don't split"), ({"channels": (8, 12, 112)}, "112 channels"),
    ({"channels": (8, 12, 68)}, "68 channels"),
    ({"channels": (8, 12, 100)}, "100 channels"), ({"cond_channels": (8, 9)}, "9 channels"),
    ({"channels": (8, 12, 0)}, "size of 0"), ({"channels": (8, 12, 16.0)}, "size of 16.0"),
    ({"blocks": (1, 0, 1)}, "size of 0"), ({"patch": 0}, "size of 0"), ({"patch": -1}, "size of -1"),
    ({"emb_channels": 0}, "size of 0"), ({"n_bins": 0}, "size of 0"), ({"n_frames": True}, "size of True"),
    ({"n_frames": math.nan}, "size of nan"),
    ({"attention": ("", "x", "")}, "along 'x'"), ({"attention": ("", "tf", "")}, "along 'tf'"),
    ({"n_bins": 30}, "30 x 16 .* multiples of 4,"), ({"n_frames": 18}, "32 x 18"), ({"patch": 3}, "multiples of 12,"),
    ({"cond_channels": (8,) * 5}, "multiples of 32,"),
    ({"seam": -1}, "seam must be a whole number from 0 to context, 0, not -1"), ({"seam": 9, "context": 8}, "8, not 9"),
    ({"seam": True}, "seam must be"), ({"seam": 1, "context": 0}, "to context, 0, not 1"),
    ({"labels": -1}, "labels must be a whole number from 0, not -1"), ({"labels": 1.0}, "labels must be"),
])
def test_odd_configurations_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(PLAIN, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [PLAIN, OURS, *PRESETS.values()])
def test_configurations_survive_json(config):
    again = UNetConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)
    with pytest.raises(FrozenInstanceError):
        config.patch = 2


def test_80_channels_are_allowed():
    config = replace(PLAIN, channels=(8, 12, 80))
    assert UNet(config)(blocks(config).float(), C_NOISE).shape == (3, 1, 32, 16)


def test_names_of_the_weights_are_stable():
    names = set(UNet(OURS).state_dict())
    assert names >= {
        "null", "noise.1.weight", "noise.3.bias", "embedding.convs.0.weight", "embedding.norms.1.bias",
        "embedding.linear.weight", "stem.weight", "places.0.row", "places.1.column", "down.0.0.block.norm0.weight",
        "down.0.1.block.conv1.bias", "down.0.0.attention.0.qkv.weight", "down.0.0.attention.1.out.bias",
        "down.1.0.block.skip.weight", "down.1.0.block.affine.weight", "middle.block.conv0.weight",
        "middle.attention.0.norm.bias", "up.1.0.block.norm1.weight", "up.0.1.block.skip.bias", "narrow.1.weight",
        "out_norm.weight", "out.bias", "seam.conv0.weight", "seam.affine.bias",
    }
    assert len(names) == 179 and not any("frequencies" in name for name in names)
    assert UNet(OURS).state_dict()["down.1.0.block.affine.weight"].shape == (128, 24)
