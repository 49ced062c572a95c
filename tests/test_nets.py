"""UNet, VAE and ControlNet: every value and name against diffusers, on random weights."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from sdxl.controlnet import ControlNet, ControlNetConfig
from sdxl.vae import VAE, VAEConfig
from sdxl.weights import build_on_meta, load_strict
from unet import UNet, UNetConfig

SDXL = dict(
    in_channels=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    block_out_channels=(320, 640, 1280),
    layers_per_block=2,
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
UP = dict(out_channels=4, up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
TINY = SDXL | dict(
    block_out_channels=(16, 32, 64),
    cross_attention_dim=24,
    transformer_layers_per_block=(1, 2, 3),
    attention_head_dim=(2, 4, 8),
    norm_num_groups=8,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=20 + 6 * 8,
)
# Two levels, attention on the finest, one block a level: other places for every branch.
SMALL = TINY | dict(
    in_channels=9,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    block_out_channels=(16, 32),
    layers_per_block=1,
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4),
)
SMALL_UP = dict(out_channels=3, up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
SDXL_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    sample_size=1024,
    scaling_factor=0.13025,
)
TINY_VAE = SDXL_VAE | dict(block_out_channels=(16, 24, 32, 32), norm_num_groups=4)
# Three levels: a quarter of the size. Tiles of 8 latents overlap by 2 in diffusers' terms.
SHORT_VAE = TINY_VAE | dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    latent_channels=3,
    scaling_factor=0.7,
    sample_size=32,
)
SIZES = [(16, 16), (13, 18), (9, 8), (4, 30)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(model, seed=0):
    """No weight, bias or norm at its default, of a size that keeps every activation near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise / p[0].numel() ** 0.5
        else:
            p.data = 0.3 * noise + (name.endswith("weight"))
    return model.eval()


def pair(theirs, ours, config):
    """A randomised model of diffusers and ours with its config and weights, names and all."""
    theirs = randomised(theirs)
    ours = ours(config.from_json(json.loads(theirs.to_json_string())))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours.eval()


@cache
def unets(which="tiny", dtype=torch.float32):
    config = TINY | UP if which == "tiny" else SMALL | SMALL_UP
    return [m.to(dtype) for m in pair(UNet2DConditionModel(**config), UNet, UNetConfig)]


@cache
def controlnets(dtype=torch.float32):
    theirs = ControlNetModel(**TINY, conditioning_embedding_out_channels=(4, 8, 12, 16))
    return [m.to(dtype) for m in pair(theirs, ControlNet, ControlNetConfig)]


@cache
def vaes(which="tiny", dtype=torch.float32):
    config = TINY_VAE if which == "tiny" else SHORT_VAE
    return [m.to(dtype) for m in pair(AutoencoderKL(**config), VAE, VAEConfig)]


def inputs(h, w, b=2, channels=4, dtype=torch.float32):
    cond = {
        "prompt_embeds": randn(b, 7, 24, seed=2, dtype=dtype),
        "pooled": randn(b, 20, seed=3, dtype=dtype),
        "time_ids": torch.tensor([[1024, 768, 0, 64, 512, 1024], [333, 512, 8, 0, 640, 256]])[:b],
    }
    x_t = randn(b, channels, h, w, seed=1, dtype=dtype)
    return x_t, torch.tensor([999, 3])[:b], cond


def theirs_of(model, x_t, t, cond, *image, **more):
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    return model(x_t, t, cond["prompt_embeds"], *image, added_cond_kwargs=added, **more)


def error(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.abs().max() > 0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ------------------------------------------------------------------------------------------- UNet


@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@torch.no_grad()
def test_unet_is_diffusers(h, w, layout, dtype, bound):
    theirs, ours = unets(dtype=dtype)
    x_t, t, cond = inputs(h, w, dtype=dtype)
    y = theirs_of(theirs, x_t, t, cond).sample
    assert 0.2 < y.std() < 5
    ours.to(memory_format=layout)
    assert error(ours(x_t.to(memory_format=layout), t, cond), y) <= bound
    # An example does not see the rest of its batch, and t may be real.
    one = {k: v[1:] for k, v in cond.items()}
    assert error(ours(x_t[1:], t[1:].float(), one), y[1:]) <= bound
    ours.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def test_unet_of_other_sizes_is_diffusers():
    theirs, ours = unets("small", torch.float64)
    for h, w in SIZES:
        network_inputs = inputs(h, w, channels=9, dtype=torch.float64)
        assert error(ours(*network_inputs), theirs_of(theirs, *network_inputs).sample) <= 1e-12


def gradients(model, forward, x_t):
    """d/d (x_t, every parameter) of the output times fixed noise."""
    model.requires_grad_(True).zero_grad()
    x_t = x_t.clone().requires_grad_(True)
    y = forward(x_t)
    (y * randn(*y.shape, seed=5, dtype=y.dtype)).sum().backward()
    return {"x_t": x_t.grad} | {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_unet_gradients_are_diffusers(checkpointing, dtype, bound):
    theirs, ours = unets(dtype=dtype)
    x_t, t, cond = inputs(9, 10, dtype=dtype)
    expected = gradients(theirs, lambda x: theirs_of(theirs, x, t, cond).sample, x_t)
    ours.checkpoint_blocks(checkpointing)
    actual = gradients(ours, lambda x: ours(x, t, cond), x_t)
    ours.checkpoint_blocks(False)
    assert actual.keys() == expected.keys()
    assert max(error(actual[k], expected[k]) for k in actual) <= bound


def test_checkpointing_keeps_less_for_the_backward_pass():
    _, ours = unets()
    saved = {}
    for on in (True, False):
        sizes = []
        ours.checkpoint_blocks(on)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            ours(*inputs(16, 16))
        saved[on] = sum(sizes)
    assert saved[True] < saved[False] / 4


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_diffusers():
    exact = unets()
    half = unets(dtype=torch.bfloat16)
    x_t, t, cond = inputs(16, 16)
    cond = {k: v.bfloat16() if k != "time_ids" else v for k, v in cond.items()}
    upcast = {k: v.float() for k, v in cond.items()}
    theirs = theirs_of(half[0], x_t.bfloat16(), t, cond).sample.float()
    ours = half[1](x_t.bfloat16(), t, cond).float()
    x_t = x_t.bfloat16().float()
    bound = 2 * error(theirs, theirs_of(exact[0], x_t, t, upcast).sample)
    assert 0 < error(ours, exact[1](x_t, t, upcast)) <= bound < 0.1
    # What comes in float32 is cast to the weights' precision.
    assert torch.equal(half[1](x_t, t, upcast).float(), ours)


@torch.no_grad()
def test_loaded_in_half_precision_the_last_layers_stay_in_float32():
    exact = unets()[1]
    x_t, t, cond = inputs(16, 16)
    weights = {k: v.half() for k, v in exact.state_dict().items()}
    exact = load_strict(build_on_meta(UNet, exact.config), weights, "a file", torch.float32)
    loaded = load_strict(build_on_meta(UNet, exact.config), weights, "a file", torch.bfloat16)
    kinds = {k.split(".")[0] for k, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kinds == {"conv_norm_out", "conv_out"}
    assert torch.equal(loaded.conv_out.weight, exact.conv_out.weight)
    seen = []
    loaded.conv_norm_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    got, norm, out = loaded(x_t, t, cond), exact.conv_norm_out, exact.conv_out
    h = seen[0].bfloat16().float()  # what comes before is in bfloat16
    h = F.silu(F.group_norm(h, 8, norm.weight, norm.bias))
    assert got.dtype == torch.float32
    assert error(got, F.conv2d(h, out.weight, out.bias, padding=1)) <= 1e-5


# ------------------------------------------------------------------------------------- ControlNet


@pytest.mark.parametrize("h, w", SIZES)
@torch.no_grad()
def test_controlnet_is_diffusers(h, w):
    theirs, ours = controlnets(torch.float64)
    image = randn(2, 3, 8 * h, 8 * w, seed=4, dtype=torch.float64).sigmoid()
    network_inputs = (*inputs(h, w, dtype=torch.float64), image)
    for scale in (1.0, 0.4):
        down, middle = theirs_of(
            theirs, *network_inputs, conditioning_scale=scale, return_dict=False
        )
        residuals = ours(*network_inputs, scale)
        assert len(residuals) == len(down) + 1 == 10
        assert all(error(a, b) <= 1e-12 for a, b in zip(residuals, (*down, middle)))
    default = ours(*network_inputs)
    assert all(error(a, b / 0.4) <= 1e-12 for a, b in zip(default, residuals))


@pytest.mark.parametrize("h, w", SIZES)
@torch.no_grad()
def test_unet_with_a_controlnet_is_diffusers(h, w):
    (theirs, ours), (base, unet) = (nets(dtype=torch.float64) for nets in (controlnets, unets))
    network_inputs = inputs(h, w, dtype=torch.float64)
    image = randn(2, 3, 8 * h, 8 * w, seed=4, dtype=torch.float64).sigmoid()
    down, middle = theirs_of(theirs, *network_inputs, image, return_dict=False)
    more = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
    y = theirs_of(base, *network_inputs, **more).sample
    assert error(unet(*network_inputs, ours(*network_inputs, image)), y) <= 1e-12
    assert error(unet(*network_inputs), y) > 0.1


def test_controlnet_gradients_are_diffusers():
    theirs, ours = controlnets(torch.float64)
    x_t, t, cond = inputs(6, 5, dtype=torch.float64)
    image = randn(2, 3, 48, 40, dtype=torch.float64)

    def flat(residuals):
        return torch.cat([r.flatten() for r in residuals])

    def of_theirs(x):
        down, middle = theirs_of(theirs, x, t, cond, image, return_dict=False)
        return flat([*down, middle])

    expected = gradients(theirs, of_theirs, x_t)
    for on in (True, False):
        ours.checkpoint_blocks(on)
        actual = gradients(ours, lambda x: flat(ours(x, t, cond, image)), x_t)
        assert actual.keys() == expected.keys()
        assert max(error(actual[k], expected[k]) for k in actual) <= 1e-10


# -------------------------------------------------------------------------------------------- VAE


@pytest.mark.parametrize("which", ["tiny", "short"])
@pytest.mark.parametrize("h, w", SIZES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@torch.no_grad()
def test_vae_is_diffusers(which, h, w, dtype, bound):
    theirs, ours = vaes(which, dtype)
    c, f, s = ours.config.latent_channels, ours.factor, ours.config.scaling_factor
    images, latents = randn(2, 3, f * h, f * w, dtype=dtype).tanh(), randn(2, c, h, w, dtype=dtype)
    assert error(ours.decode(s * latents), theirs.decode(latents).sample) <= bound
    posterior = theirs.encode(images).latent_dist
    assert error(ours.encode(images), s * posterior.mode()) <= bound
    draw = posterior.sample(generator=torch.Generator().manual_seed(7))
    assert error(ours.encode(images, randn(2, c, h, w, seed=7, dtype=dtype)), s * draw) <= bound
    assert (draw - posterior.mode()).abs().mean() > 0.1


@torch.no_grad()
def test_vae_in_channels_last_and_float64_is_diffusers():
    theirs, ours = vaes()
    x, z = randn(1, 3, 104, 72).tanh(), randn(1, 4, 13, 9)
    ours.to(memory_format=torch.channels_last)
    z_last = (0.13025 * z).to(memory_format=torch.channels_last)
    assert error(ours.decode(z_last), theirs.decode(z).sample) <= 1e-5
    ours.to(memory_format=torch.contiguous_format)
    theirs, ours = vaes(dtype=torch.float64)
    # What comes in float32 is cast to the weights' precision.
    assert error(ours.encode(x) / 0.13025, theirs.encode(x.double()).latent_dist.mode()) <= 1e-12
    assert error(ours.decode(z), theirs.decode(z.double() / 0.13025).sample) <= 1e-12


@torch.no_grad()
def test_log_variance_is_clamped():
    theirs, ours = pair(AutoencoderKL(**TINY_VAE), VAE, VAEConfig)
    for model in (theirs.double(), ours.double()):
        model.quant_conv.bias[4:] = torch.tensor([60.0, -90.0, 15.0, -15.0]).double()
    images = randn(2, 3, 32, 40).double().tanh()
    draw = theirs.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    latents = ours.encode(images, randn(2, 4, 4, 5, seed=7, dtype=torch.float64)) / 0.13025
    assert max(error(latents[:, i], draw[:, i]) for i in range(4)) <= 1e-12
    assert draw[:, 0].abs().max() > 2e4


def test_vae_runs_one_example_at_a_time():
    _, ours = vaes()
    seen = []
    hooks = [
        m.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
        for m in (ours.encoder, ours.decoder)
    ]
    with torch.no_grad():
        ours.decode(ours.encode(randn(3, 3, 16, 24)))
    for hook in hooks:
        hook.remove()
    assert seen == [1] * 6


# -------------------------------------------------------------------------------------- VAE tiles


@pytest.fixture
def tiled():
    """Diffusers' and our decoder of 4 pixels a latent, in tiles of 8 latents that overlap by 2."""
    theirs, ours = pair(AutoencoderKL(**SHORT_VAE), VAE, VAEConfig)
    assert (ours.tile, ours.overlap) == (128, 32)
    ours.tile, ours.overlap = 8, 2
    theirs.enable_tiling()
    assert (theirs.tile_latent_min_size, theirs.tile_sample_min_size) == (8, 32)
    return theirs, ours


@torch.no_grad()
def test_tiles_are_diffusers_where_they_lie_alike(tiled):
    """One row of tiles. Diffusers goes on with narrower ones, so only its first are the same."""
    theirs, ours = tiled
    z = randn(2, 3, 6, 20)
    expected, actual = theirs.decode(z).sample, ours.decode(0.7 * z)
    assert error(actual[..., : 4 * 18], expected[..., : 4 * 18]) <= 1e-5
    down = z.mT
    assert (
        error(ours.decode(0.7 * down)[..., : 4 * 18, :], theirs.decode(down).sample[..., :72, :])
        <= 1e-5
    )
    theirs.disable_tiling()
    assert error(actual, theirs.decode(z).sample) > 0.01


@torch.no_grad()
def test_a_picture_of_one_tile_is_not_cut(tiled):
    theirs, ours = tiled
    theirs.disable_tiling()
    # As many pixels as one tile, in any shape: SDXL's portrait and landscape sizes are such.
    for h, w in ((8, 8), (3, 5), (4, 16), (16, 4), (12, 5)):
        z = randn(2, 3, h, w)
        assert error(ours.decode(0.7 * z), theirs.decode(z).sample) <= 1e-5
    z = randn(1, 3, 8, 9)
    assert error(ours.decode(0.7 * z), theirs.decode(z).sample) > 1e-3


def fade(n, starts, j):
    """The j-th tile's weights along n latents of 4 pixels, interpolated between its corners."""
    place, weights = np.arange(4 * n) / 4, np.ones(4 * n)
    if j > 0:
        weights = np.interp(place, [starts[j], starts[j - 1] + 8], [0, 1])
    if j + 1 < len(starts):
        weights = weights - np.interp(place, [starts[j + 1], starts[j] + 8], [0, 1])
    return torch.from_numpy(weights)


@pytest.mark.parametrize(
    "h, w, rows, columns",
    [
        (14, 20, [0, 6], [0, 6, 12]),
        (9, 15, [0, 1], [0, 6, 7]),
        (17, 8, [0, 6, 9], [0]),
        (5, 22, [0], [0, 6, 12, 14]),
    ],
)
@torch.no_grad()
def test_tiles_are_whole_and_cross_fade(tiled, h, w, rows, columns):
    theirs, ours = tiled[0].double(), tiled[1].double()
    theirs.disable_tiling()
    z, expected = randn(1, 3, h, w).double(), torch.zeros(1, 3, 4 * h, 4 * w).double()
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            part = theirs.decode(z[:, :, y : y + 8, x : x + 8]).sample
            tile = torch.zeros_like(expected)
            tile[:, :, 4 * y : 4 * y + part.shape[2], 4 * x : 4 * x + part.shape[3]] = part
            expected += fade(h, rows, i)[:, None] * fade(w, columns, j) * tile
    assert error(ours.decode(0.7 * z), expected) <= 1e-12


def test_tile_weights_sum_to_one():
    _, ours = vaes()
    for n in (1, 100, 128, 129, 150, 160, 161, 223, 224, 225, 256, 400, 511):
        total = torch.zeros(8 * n, dtype=torch.float64)
        ends = []
        for start, window in ours._windows(n):
            assert window.min() >= 0 and len(window) == 8 * min(n, 128)
            total[8 * start : 8 * start + len(window)] += window
            ends.append(start + 128)
        assert (total - 1).abs().max() <= 1e-15
        assert ours._windows(n)[0][0] == 0 and max(ends) == max(n, 128)
        assert all(b - a <= 96 for a, b in pairwise(ends))


@torch.no_grad()
def test_tiles_of_a_decoder_without_context_are_the_whole_picture(tiled):
    ours = tiled[1].double()
    ours.decoder = torch.nn.Upsample(scale_factor=4)
    for h, w in ((9, 9), (15, 15), (20, 31), (3, 40), (40, 6)):
        z = randn(2, 3, h, w, dtype=torch.float64)
        untiled = ours.decoder(ours.post_quant_conv(z / 0.7))
        assert error(ours.decode(z), untiled) <= 1e-14


# --------------------------------------------------------------------------------- names, configs


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_full_size_names_and_shapes_are_diffusers():
    with torch.device("meta"):
        unets = UNet2DConditionModel(**SDXL | UP), UNet(UNetConfig())
        controlnets = ControlNetModel(**SDXL), ControlNet(ControlNetConfig())
        vaes = AutoencoderKL(**SDXL_VAE), VAE(VAEConfig())
    for theirs, ours in (unets, controlnets, vaes):
        assert shapes(ours) == shapes(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        config = type(ours.config)
        assert config.from_json(json.loads(theirs.to_json_string())) == ours.config == config()
    assert sum(p.numel() for p in unets[1].parameters()) == 2_567_463_684
    assert sum(p.numel() for p in vaes[1].parameters()) == 83_653_863


def test_configs_of_tiny_models():
    assert unets()[1].config == UNetConfig(
        4, 4, (16, 32, 64), (0, 2, 3), (2, 4, 8), 3, 2, 8, 24, 8, 68
    )
    assert controlnets()[1].config.embedding == (4, 8, 12, 16)
    assert vaes("short")[1].config == VAEConfig((8, 16, 16), 1, 4, 3, 0.7)


@pytest.mark.parametrize(
    "config, model, base",
    [(UNetConfig, UNet2DConditionModel, SDXL | UP), (ControlNetConfig, ControlNetModel, SDXL)],
)
def test_other_families_of_networks_are_refused(config, model, base):
    with torch.device("meta"):
        written = json.loads(model(**base).to_json_string())
    config.from_json(written)
    with pytest.raises(ValueError, match=r"not an SDXL .*addition_embed_type is None"):
        config.from_json(written | {"addition_embed_type": None})
    del written["addition_embed_type"]
    with pytest.raises(ValueError, match=r"not an SDXL .*addition_embed_type is None"):
        config.from_json(written)
    written["use_linear_projection"] = False
    with pytest.raises(ValueError, match="not an SDXL"):
        config.from_json(written)


def test_a_config_of_an_older_version_is_refused():
    with torch.device("meta"):
        written = json.loads(UNet2DConditionModel(**SDXL | UP).to_json_string())
    for told in ("", "s"):
        with pytest.raises(ValueError, match="written by an older version"):
            UNetConfig.from_json(written | {"told": told})
    # A whole UNet is trained for TCF(S+) alone; another scalar would go without its value.
    assert UNetConfig.from_json(written | {"scalar": "target_time"}).scalar == "target_time"
    with pytest.raises(ValueError, match="scalar is 'num_steps'"):
        UNetConfig.from_json(written | {"scalar": "num_steps"})


def test_other_controlnets_are_refused():
    with torch.device("meta"):
        written = json.loads(ControlNetModel(**SDXL).to_json_string())
    wrong = {
        "controlnet_conditioning_channel_order": "bgr",
        "global_pool_conditions": True,
        "mid_block_type": "UNetMidBlock2D",
        "use_linear_projection": False,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            ControlNetConfig.from_json(written | {name: value})
    with pytest.raises(ValueError, match="not an SDXL ControlNet"):
        ControlNetConfig.from_json(json.loads(UNet2DConditionModel(**TINY | UP).to_json_string()))
    del written["mid_block_type"]
    assert ControlNetConfig.from_json(written) == ControlNetConfig()


def test_other_autoencoders_are_refused():
    written = json.loads(vaes()[0].to_json_string())
    wrong = {
        "_class_name": "AutoencoderTiny",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "shift_factor": 0.1159,
        "latents_mean": [0.1] * 4,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"not SDXL's AutoencoderKL: {name} is"):
            VAEConfig.from_json(written | {name: value})
    with pytest.raises(ValueError, match="scaling_factor is None, not a number"):
        VAEConfig.from_json({k: v for k, v in written.items() if k != "scaling_factor"})
    with pytest.raises(ValueError, match="block_out_channels is None"):
        VAEConfig.from_json({"hidden_size": 768})


WRONG = [None, True, False, "", "2", [], [[2]], {}, 2.5, 4.0, -1, 0, 1e308, float("nan"), 10**9]
WRONG += [10**40, [2] * 99, [10**9] * 3, ["x"] * 3, [None] * 3, [2, 2, True], "x" * 10**5]
# Entries that are sizes, and the fields that have them.
FIELDS = {
    "in_channels": "in_channels", "out_channels": "out_channels",
    "block_out_channels": "channels", "layers_per_block": "layers_per_block",
    "attention_head_dim": "heads", "norm_num_groups": "groups",
    "cross_attention_dim": "cross_attention_dim", "addition_time_embed_dim": "time_ids_width",
    "projection_class_embeddings_input_dim": "add_embedding_dim",
    "latent_channels": "latent_channels", "scaling_factor": "scaling_factor",
    "conditioning_embedding_out_channels": "embedding",
}  # fmt: skip


@pytest.mark.parametrize("models, config", [
    (unets, UNetConfig), (controlnets, ControlNetConfig), (vaes, VAEConfig)
])  # fmt: skip
def test_any_json_in_a_config_is_read_as_it_is_or_refused_in_one_line(models, config):
    written = json.loads(models()[0].to_json_string())
    expected, refused = config.from_json(written), 0
    for name, value in product(written, WRONG):
        try:
            read = config.from_json(written | {name: value})
        except ValueError as problem:
            message, refused = str(problem), refused + 1
            # Two entries that do not fit together are named by their values.
            assert name in message or "do not make" in message, (name, value, message)
            assert "\n" not in message and len(message) < 250
            continue
        if name == "transformer_layers_per_block":
            assert value == 0 and not isinstance(value, bool | float)
        elif name in FIELDS and hasattr(expected, FIELDS[name]):
            assert type(value) in (int, float) and getattr(read, FIELDS[name]) in (value, (value,))
        else:
            assert read == expected, (name, value)
    assert refused > 10 * len(WRONG)


def test_a_controlnet_fits_the_unet():
    unet, controlnet = unets()[1].config, controlnets()[1].config
    controlnet.check_fits(unet)
    # Smaller ControlNets have shallower transformers, and the residuals fit all the same.
    replace(controlnet, transformer_depth=(0, 1, 1), mid_transformer_depth=1).check_fits(unet)
    for name, value in (("channels", (16, 32, 72)), ("time_ids_width", 16), ("in_channels", 9)):
        with pytest.raises(ValueError, match=f"its {name} is .* as in the UNet"):
            replace(controlnet, **{name: value}).check_fits(unet)
