"""Loading and sampling a tiny SDXL against diffusers' networks and a sampler written out here."""

import json
import shlex
import shutil
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import sample
from common import files, pictures
from sdxl import keys, load
from sdxl.lora import LoRA
from sdxl.lora_files import write_diffusers
from solvers import SOLVERS, solve
from tests.helpers import SCHEDULE
from tests.oracles import UNET, VAE, Reference, close, ours, randomise, run_sample, text_config

# ---------------------------------------------------------------------------------- a tiny SDXL
#
# Heads 64 wide and 32 groups, as in every SDXL, so that a single file tells all of its sizes.


def test_original_names_are_diffusers_own(folder, single):
    """Diffusers' converters, given our single file, give back what the folder holds."""
    from diffusers.loaders import single_file_utils as theirs

    checkpoint = {k: v for k, v in load_file(single).items() if not k.startswith("model_ema")}
    unet = theirs.convert_ldm_unet_checkpoint(
        dict(checkpoint), dict(UNet2DConditionModel(**UNET).config)
    )
    vae = theirs.convert_ldm_vae_checkpoint(dict(checkpoint), dict(AutoencoderKL(**VAE).config))
    for name, got in (("unet", unet), ("vae", vae)):
        wanted = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        assert set(got) == set(wanted)
        assert all(torch.equal(got[k].reshape(wanted[k].shape), wanted[k]) for k in wanted)
    text_2 = CLIPTextModelWithProjection(text_config(64, hidden_act="gelu", projection_dim=48))
    got = theirs.convert_open_clip_checkpoint(text_2, dict(checkpoint), prefix=keys.TEXT_2)
    wanted = load_file(folder / "text_encoder_2" / "model.safetensors")
    assert all(torch.equal(got[k], v) for k, v in wanted.items())


def test_single_file_tells_its_sizes(folder, single):
    one, other = load.load_sdxl(folder), load.load_sdxl(single, folder / "tokenizer")
    for part in ("unet", "vae", "encoder_1", "encoder_2"):
        a, b = getattr(one, part), getattr(other, part)
        assert a.config == b.config
        assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())


# ------------------------------------------------------------------- an independent sampler


TIMES = {
    ("equidistant", 4): [999, 751, 499, 251], ("equidistant", 5): [999, 799, 599, 399, 199],
    ("equidistant", 8): [999, 875, 751, 627, 499, 375, 251, 127],
    ("nonequidistant", 6): [999, 875, 751, 627, 499, 251],
    ("nonequidistant", 7): [999, 875, 751, 627, 499, 375, 251],
}  # fmt: skip


CASES = [
    ("equidistant", 4, {}),
    ("equidistant", 5, {"gamma": 0.0, "cfg": 1.0}),
    ("equidistant", 8, {"cfg": 3.5}),
    ("nonequidistant", 6, {"gamma": 0.0, "cfg": 3.5}),
    ("nonequidistant", 7, {"negative": "grey, 7"}),
    ("equidistant", 4, {"cfg": 3.5, "clip_steps": 2}),
    ("equidistant", 4, {"clip_steps": 4, "percentile": 0.8, "highest": 20.0}),
    ("equidistant", 4, {"cfg": 3.0, "tune": 3.5}),
    ("equidistant", 4, {"cfg": 2.0, "tune": 3.5, "negative": "grey, 7"}),
    ("equidistant", 4, {"cfg": 1.5, "tune": 3.5, "negative": "grey, 7"}),
]
FLAGS = {"gamma": "--gamma", "cfg": "--cfg", "negative": "--negative-prompt",
         "tune": "--tune-guidance", "clip_steps": "--clip-steps",
         "percentile": "--clip-percentile", "highest": "--clip-max"}  # fmt: skip


@pytest.mark.parametrize(("schedule", "k", "options"), CASES)
def test_latents_are_an_independent_samplers(
    schedule, k, options, folder, monkeypatch, capsys, tmp_path
):
    flags = []
    for name, value in options.items():
        # The paper's w' is g' - 1.
        flags += [FLAGS[name], value + 1 if name == "tune" else value]
    prompt = "a red fox, 2 trees."
    got = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", prompt, "--schedule", schedule,
               "--steps", k, "--seed", 7, *flags)  # fmt: skip
    expected = Reference(folder).latents(prompt, 7, 64, 72, TIMES[schedule, k], **options)
    assert close(got, expected)


def test_a_lora_brings_its_grid_and_leaves_the_last_layers_in_float32(folder, tmp_path):
    """N from the header that train_sdxl.py writes; a flag goes before it, the paper's 250 after."""
    unet, path = load.load_sdxl(folder).unet, tmp_path / "lora.safetensors"
    fresh = LoRA.init(unet, 4, 2.0, torch.Generator().manual_seed(0))
    write_diffusers(path, fresh, tdd_solver_steps="50")
    (tmp_path / "unet").mkdir()
    shutil.copy(path, tmp_path / "unet/diffusion_pytorch_model.safetensors")

    def checked(*words):
        base = ["--model", folder, "--prompt", "a", "--device", "cpu", "--dtype", "bf16", *words]
        args = sample.parser().parse_args(list(map(str, base)))
        sample.check(args)
        return args

    def timesteps(*words):
        return sample.build_config(checked(*words)).timesteps

    of_50, of_250 = [999, 759, 499, 259], [999, 751, 499, 251]
    assert timesteps() == of_250
    assert timesteps("--lora", f"{path}:0.5") == of_50
    assert timesteps("--unet", tmp_path / "unet") == of_50
    assert timesteps("--lora", path, "--solver-steps", 250) == of_250
    other = tmp_path / "other.safetensors"
    for said in ("250", "many"):
        write_diffusers(other, fresh, tdd_solver_steps=said)
        with pytest.raises(ValueError, match=r"trained for .* --solver-steps|solver_steps 'many'"):
            checked("--lora", path, "--lora", other)
    for words in ([], ["--lora", path]):
        args = checked(*words)
        model, *_ = sample.build_network(args)
        state = {k: v for k, v in model.unet.state_dict().items() if v.dtype == torch.float32}
        assert {k.split(".")[0] for k in state} == {"conv_norm_out", "conv_out"}
        assert torch.equal(state["conv_out.weight"], unet.conv_out.weight)


def test_single_file_gives_the_same_picture(folder, single, monkeypatch, capsys, tmp_path):
    one = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", "a fox")
    other = ours(
        monkeypatch,
        capsys,
        single,
        tmp_path,
        "--prompt",
        "a fox",
        "--tokenizer",
        folder / "tokenizer",
    )
    assert torch.equal(one, other)


def test_a_batch_is_its_single_runs(folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "many"
    words = ["--prompt", "a fox", "--prompt", "two owls", "--num-images", 2, "--batch-size", 3]
    together = ours(monkeypatch, capsys, folder, tmp_path, *words, "--seed", 5, "--output", out)
    for i, prompt in enumerate(["a fox", "a fox", "two owls", "two owls"]):
        alone = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", prompt, "--seed", 5 + i)
        assert close(together[i : i + 1], alone)
        a, b = (
            np.asarray(Image.open(p)).astype(int) for p in (out / f"{i:05}.png", tmp_path / "x.png")
        )
        assert np.abs(a - b).max() <= 1
    assert Image.open(out / "grid.png").size == (2 * 72, 2 * 64)


def test_low_memory_is_the_same_with_a_part_at_a_time(folder, monkeypatch, capsys, tmp_path):
    """Encoders, UNet and VAE visit the device in turn; between visits their weights are NaN."""
    words = ["--prompt", "a fox", "--num-images", 5, "--batch-size", 2]
    expected = ours(monkeypatch, capsys, folder, tmp_path, *words, "--output", tmp_path / "a")
    visits, weights, build = [], {}, sample.build_network

    def hide(modules):
        for p in [p for module in modules for p in module.parameters()]:
            weights[p] = p.data
            p.data = torch.full_like(p, torch.nan)

    def build_and_hide(args):
        model, network, denoisers = build(args)
        hide([model.encoder_1, model.encoder_2, model.vae, *denoisers])
        return model, network, denoisers

    @contextmanager
    def visit(device, *modules):
        visits.append([type(module).__name__ for module in modules])
        for p in [p for module in modules for p in module.parameters()]:
            p.data = weights[p]
        yield
        hide(modules)

    monkeypatch.setattr(sample, "build_network", build_and_hide)
    monkeypatch.setattr(sample.pipeline, "on_device", visit)
    monkeypatch.setattr(sample, "LOW_MEMORY_TURN", 4)
    words += ["--low-memory", "--output", tmp_path / "b"]
    assert torch.equal(ours(monkeypatch, capsys, folder, tmp_path, *words), expected)
    # Five pictures in batches of two are two turns: of two batches, and of one.
    assert visits == 2 * [["TextEncoder", "TextEncoder"], ["UNet"], ["VAE"]]


@pytest.mark.slow
def test_compiled_network_is_the_same(folder, monkeypatch, capsys, tmp_path):
    words = ["--prompt", "a fox", "--cfg", 1]
    eager = ours(monkeypatch, capsys, folder, tmp_path, *words)
    compiled = ours(monkeypatch, capsys, folder, tmp_path, *words, "--compile")
    assert close(compiled, eager) and not torch.equal(compiled, eager)


def test_picture_is_diffusers_decoding_and_tells_how_it_was_made(
    folder, monkeypatch, capsys, tmp_path
):
    latents = ours(
        monkeypatch,
        capsys,
        folder,
        tmp_path,
        "--prompt",
        "a 'fox', \"2\"",
        "--seed",
        3,
        "--cfg",
        1.5,
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        pixels = vae.decode(latents / 0.13025).sample[0].permute(1, 2, 0)
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    picture = Image.open(tmp_path / "x.png")
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1
    assert json.loads(picture.text["settings"])["cfg"] == 1.5
    again = picture.text["command"]
    words = shlex.split(again)[2:]
    words = [w for w in words if not w.startswith("--output")] + [f"--output={tmp_path / 'y.png'}"]
    assert run_sample(monkeypatch, capsys, *words)[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), np.asarray(picture))


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_sample_the_teacher(name, folder, monkeypatch, capsys, tmp_path):
    got = ours(monkeypatch, capsys, folder, tmp_path, "--prompt", "a fox", "--sampler", name,
               "--steps", 5, "--cfg", 3)  # fmt: skip
    reference, times = Reference(folder), TIMES["equidistant", 5]
    if name == "ddim":
        assert close(got, reference.latents("a fox", 0, 64, 72, times, gamma=0.0, cfg=3.0))
        return
    cond, null = reference.encode("a fox"), [torch.zeros(1, 77, 128), torch.zeros(1, 48)]
    sizes = torch.tensor([[64, 72, 0, 0, 64, 72]])

    def eps(x, t):
        c, u = (
            reference.unet(x, t, a, added_cond_kwargs={"text_embeds": b, "time_ids": sizes}).sample
            for a, b in (cond, null)
        )
        return 3 * c - 2 * u

    with torch.no_grad():
        x = torch.randn((1, 4, 8, 9), generator=torch.Generator().manual_seed(0))
        assert close(got, solve(eps, x, [*times, -1], SCHEDULE, SOLVERS[name]()))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_tdm_student_is_sampled_as_it_was_trained(name, folder, monkeypatch, capsys, tmp_path):
    """By the solver of its header, unless a flag says another; the PNG's command does the same."""
    lora, plain = tmp_path / "tdm.safetensors", tmp_path / "plain.safetensors"
    fresh = LoRA.init(load.load_sdxl(folder).unet, 4, 2.0, torch.Generator().manual_seed(0))
    write_diffusers(lora, fresh, tdd_method="tdm", tdd_K="[3]", tdd_solver=name)
    write_diffusers(plain, fresh)
    flags = ["--steps", 3, "--cfg", 1, "--prompt", "a fox", "--lora", plain, "--sampler"]
    expected = ours(monkeypatch, capsys, folder, tmp_path, *flags, name)
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 72, "--lora", lora]
    words += ["--prompt", "a fox", "--output", tmp_path / "x.png"]
    code, said, err = run_sample(monkeypatch, capsys, *words)
    # DDIM is the gamma-sampler at gamma = 0, and stays open to another gamma.
    sampler = "sampler tdd, steps 3, cfg 1.0, gamma 0.0" if name == "ddim" else f"sampler {name}, "
    assert code == 0 and f"from the header of tdm.safetensors: {sampler}" in said, err
    assert ("gamma" in said) == (name == "ddim")
    got = ours(monkeypatch, capsys, folder, tmp_path, *words[2:])
    assert torch.equal(got, expected)
    picture = Image.open(tmp_path / "x.png")
    again = shlex.split(picture.text["command"])[2:-1]
    assert ("--gamma=0.0" in again) == (name == "ddim")
    assert run_sample(monkeypatch, capsys, *again, "--output", tmp_path / "y.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "y.png")), np.asarray(picture))


def test_controlnet(folder, monkeypatch, capsys, tmp_path):
    shared = {k: v for k, v in UNET.items() if k not in ("out_channels", "up_block_types")}
    net = randomise(ControlNetModel(**shared), 9)
    net.save_pretrained(tmp_path / "control")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255

    def control(x, t, tokens, added):
        down, mid = net(x, t, tokens, image, 0.7, added_cond_kwargs=added, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    words = ["--controlnet", tmp_path / "control", "--control-image", tmp_path / "edges.png"]
    words += ["--prompt", "a fox", "--control-scale", 0.7]
    got = ours(monkeypatch, capsys, folder, tmp_path, *words)
    times = TIMES["equidistant", 4]
    assert close(got, Reference(folder).latents("a fox", 0, 64, 72, times, control=control))
    assert not close(got, Reference(folder).latents("a fox", 0, 64, 72, times), 1e-2)


def test_control_image_is_read_as_diffusers_does(tmp_path):
    """Another size than the picture's: Lanczos; 16-bit depth: its upper byte."""
    from diffusers.image_processor import VaeImageProcessor

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    expected = processor.preprocess(Image.fromarray(pixels), 64, 72)[0]
    ours_ = pictures.open_image(tmp_path / "edges.png").resize((72, 64), Image.Resampling.LANCZOS)
    assert np.allclose(np.asarray(ours_).transpose(2, 0, 1) / 255, expected, atol=1e-6)
    depth = rng.integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    assert np.array_equal(
        np.asarray(pictures.open_image(tmp_path / "depth.png"))[..., 0], depth >> 8
    )


# --------------------------------------------------------------------------- evaluation sets


def test_prompts_file_is_resumed_and_shared_out(folder, monkeypatch, capsys, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "set"
    prompts.write_text("a fox\n\nan owl\ntwo trees\n")
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--steps", 2,
             "--prompts", prompts, "--output", out]  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_sample(monkeypatch, capsys, *words)[0] == 0
    assert [p.name for p in sorted(out.iterdir())] == ["00001.png"]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    before = (out / "00001.png").stat().st_mtime_ns
    code, said, _ = run_sample(monkeypatch, capsys, *words)
    assert (code, "2 pictures sampled" in said) == (0, True)
    assert [p.name for p in sorted(out.iterdir())] == ["00000.png", "00001.png", "00002.png"]
    assert (out / "00001.png").stat().st_mtime_ns == before
    assert json.loads(Image.open(out / "00002.png").text["settings"])["prompt"] == ["two trees"]
    assert "0 pictures sampled" in run_sample(monkeypatch, capsys, *words)[1]
    # Half a file is made anew, other settings are never mixed in.
    whole = (out / "00000.png").read_bytes()
    (out / "00000.png").write_bytes(whole[:100])
    assert "1 pictures sampled" in run_sample(monkeypatch, capsys, *words)[1]
    assert np.array_equal(
        np.asarray(Image.open(out / "00000.png")), np.asarray(Image.open(BytesIO(whole)))
    )
    code, _, err = run_sample(monkeypatch, capsys, *words, "--cfg", 3)
    assert (code, "was made with another cfg" in err) == (2, True)
    # Nor is a picture from elsewhere written over, of whatever format.
    for kind in ("PNG", "JPEG"):
        Image.new("RGB", (8, 8)).save(out / "00000.png", kind)
        code, _, err = run_sample(monkeypatch, capsys, *words)
        assert (code, "00000.png is not sample.py's: name another --output" in err) == (2, True)


def test_a_folders_pictures_are_not_lost_to_other_settings(folder, monkeypatch, capsys, tmp_path):
    """With --prompt, and with --save-latents, where pictures are made anew."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\nan owl\n")
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--steps", 1]
    latents = ["--save-latents", tmp_path / "l.safetensors"]
    one, two = ["--prompt", "a fox"], ["--prompt", "a fox", "--num-images", 2]
    for i, asked in enumerate((one, two, ["--prompts", prompts, *latents])):
        call = [*words, *asked, "--output", f"{tmp_path}/set-{i}/"]
        assert run_sample(monkeypatch, capsys, *call)[0] == 0
        first = (tmp_path / f"set-{i}" / "00000.png").read_bytes()
        made_anew = f"{min(i + 1, 2)} pictures sampled"
        assert made_anew in run_sample(monkeypatch, capsys, *call)[1]
        code, _, err = run_sample(monkeypatch, capsys, *call, "--cfg", 3)
        said = "00000.png was made with another cfg: name another --output"
        assert (code, err.count("\n"), said in err) == (2, 1, True), err
        assert (tmp_path / f"set-{i}" / "00000.png").read_bytes() == first
    # A file that is named is meant.
    for cfg in (2, 3):
        call = [*words, *one, "--output", tmp_path / "x.png", "--cfg", cfg]
        assert run_sample(monkeypatch, capsys, *call)[0] == 0


def test_a_process_of_several_names_no_gpu_of_its_own(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    monkeypatch.setattr(sample.distributed, "get_dist_info", lambda device: (1, 2, f"{device}:0"))
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--steps", 1]
    words += ["--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "set"]
    assert run_sample(monkeypatch, capsys, *words)[0] == 0
    text = Image.open(tmp_path / "set" / "00001.png").text
    assert "--device=cpu" in shlex.split(text["command"])
    assert json.loads(text["settings"])["device"] == "cpu"


def test_blank_lines_among_prompts_are_counted(tmp_path, capsys):
    """They shift numbers and seeds; those at the end do not. Training reads its file twice."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\n \nb\n\nc\n\n\n")
    for _ in range(2):
        assert files.read_lines("--prompts", file) == ["a", "b", "c"]
    assert capsys.readouterr().err == f"{file}: 3 blank lines passed over (first: line 2)\n"
    file.write_text("a\nb\n\n")
    assert files.read_lines("--prompts", file) == ["a", "b"] and not capsys.readouterr().err


def test_a_line_is_a_prompt(tmp_path):
    """A mark at the start and carriage returns go; other separators stay in their caption."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\r\n\ntwo\x0c\x85".encode())
    assert sample.expand_prompts(None, file, 2) == ["one\u2028still one"] * 2 + ["two\x0c\x85"] * 2


# ---------------------------------------------------------------------------------- bad input


def spoil(folder, tmp_path, how):
    """A copy of the model folder (or single file) with one thing wrong."""
    root = tmp_path / "spoilt"
    shutil.copytree(folder, root)
    unet = root / "unet" / "diffusion_pytorch_model.safetensors"
    config = root / "unet" / "config.json"
    if how == "truncated":
        unet.write_bytes(unet.read_bytes()[:-1000])
    elif how == "missing key":
        save_file({k: v for k, v in load_file(unet).items() if k != "conv_in.bias"}, unet)
    elif how == "extra key":
        save_file({**load_file(unet), "conv_in.extra": torch.ones(1)}, unet)
    elif how == "shape":
        save_file({**load_file(unet), "conv_in.bias": torch.ones(3)}, unet)
    elif how == "sd15":
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "addition_embed_type": None})
        )
    elif how == "broken json":
        config.write_text("{")
    elif how == "no weights":
        unet.unlink()
    elif how == "v-prediction":
        (root / "scheduler").mkdir()
        scheduler = root / "scheduler" / "scheduler_config.json"
        scheduler.write_text('{"prediction_type": "v_prediction"}')
    elif how == "inpainting":
        config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
        save_file({**load_file(unet), "conv_in.weight": torch.zeros(64, 9, 3, 3)}, unet)
    elif how == "list":
        config.write_text("[]")
    return root


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "no whole safetensors file"), ("missing key", "1 missing: conv_in.bias"),
        ("extra key", "1 unexpected: conv_in.extra"),
        ("shape", "conv_in.bias (3,) instead of (64,)"),
        ("sd15", "not an SDXL UNet"), ("broken json", "config.json cannot be read"),
        ("no weights", "holds no diffusion_pytorch_model"),
        ("v-prediction", "is of v-prediction; only eps"),
        ("inpainting", "takes 9 channels of latents, not 4"),
        ("list", "holds no names and values"),
    ],
)  # fmt: skip
def test_spoilt_models_are_refused_in_one_line(how, said, folder, monkeypatch, capsys, tmp_path):
    root = spoil(folder, tmp_path, how)
    words = ["--model", root, "--prompt", "a", "--device", "cpu", "--output", tmp_path / "x.png"]
    code, _, err = run_sample(monkeypatch, capsys, *words)
    assert (code, err.count("\n"), said in err) == (2, 1, True), err
    assert err.startswith("sample.py: ")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--height", 100], "not a multiple of 8"), (["--steps", 0], "at least 1"),
        (["--steps", 51, "--solver-steps", 50], "51 steps: from 1 to 50"),
        (["--solver-steps", 300], "must divide"),
        (["--steps", 9, "--schedule", "nonequidistant"], "no non-equidistant schedule of 9"),
        (["--device", "cuda"], "no GPU"), (["--gamma", 2], "at most 1"),
        (["--output", "FILE/x.png"], "cannot write"), (["--prompts", "nowhere"], "not both"),
        (["--lora", "FILE"], "no whole safetensors"),
        (["--lora", "nowhere.safetensors:0.5"], "is missing"),
        (["--control-image", "FILE"], "each --controlnet needs a --control-image"),
        (["--model", "nowhere"], "does not exist"),
        (["--model", "SINGLE"], "holds no tokenizer"),
        (["--model", "EMPTY"], "model_index.json is missing"),
        (["--sampler", "ddim", "--clip-steps", 1], "--clip-steps is for --sampler tdd"),
        (["--sampler", "ddim", "--gamma", 0.7], "--gamma is for --sampler tdd: leave it away"),
        (["--sampler", "ddim", "--tcf", 2], "--tcf works with --sampler tdd, not ddim"),
        (["--clip-max", 2], "--clip-max is for --clip-steps"),
        (["--clip-percentile", 0.9, "--clip-max", 1], "--clip-percentile is for --clip-steps"),
        (["--clip-percentile", 0.9, "--clip-steps", 1], "--clip-steps with a --clip-max above 1"),
        (["--negative-prompt", "x", "--cfg", 1], "no effect at --cfg 1, where guidance is off"),
        # Eq. 13's other terms are of the prompt and the null condition.
        (["--negative-prompt", "x", "--cfg", 1, "--tune-guidance", 4.5], "no effect at --cfg 1"),
        (["--cfg", "nan"], "at least 0"), (["--lora", "x.safetensors:nan"], "the scale is nan"),
        (["--device", "foo"], "cannot be used here"), (["--device", "meta"], "cannot be used here"),
        (["--output", "x.jpg"], "name it .png"), (["--save-latents", "EMPTY"], "is a folder"),
        (["--save-latents", "FILE"], "FILE holds something else, which would be lost"),
        (["--save-latents", "SINGLE"], "holds something else, which would be lost"),
        (["--device", "hpu"], "--device hpu cannot be used here"),
        (["--control-image", "FILE", "--controlnet", "UNET"], "no picture that can be read"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_in_one_line(
    words, said, folder, single, monkeypatch, capsys, tmp_path
):
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is a GPU")
    (tmp_path / "FILE").write_text("in the way")
    (tmp_path / "EMPTY").mkdir()
    swap = {"FILE": str(tmp_path / "FILE"), "EMPTY": str(tmp_path / "EMPTY"), "SINGLE": str(single),
            "UNET": str(folder / "unet")}  # fmt: skip
    for old, new in swap.items():
        words = [str(word).replace(old, new) for word in words]
    base = ["--model", folder, "--prompt", "a", "--device", "cpu", "--output", tmp_path / "x.png"]
    code, _, err = run_sample(monkeypatch, capsys, *base, *words)
    assert (code, err.count("\n"), said in err) == (2, 1, True), err


@pytest.mark.parametrize("how", ["fp16", "sharded", "sharded fp16"])
def test_other_layouts_of_a_folder(how, folder, tmp_path):
    """Diffusers' own .fp16 files and shards, against what diffusers loads of them."""
    root, sharded = tmp_path / "other", "sharded" in how
    shutil.copytree(folder, root)
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    variant = "fp16" if "fp16" in how else None
    unet = unet.half() if variant else unet
    unet.save_pretrained(root / "unet", variant=variant, max_shard_size="1MB" if sharded else "9GB")
    files = {path.name for path in (root / "unet").iterdir()}
    assert (len(files) > 3) == sharded
    assert not variant or all("fp16" in name or name == "config.json" for name in files)
    state = load.load_sdxl(root).unet.state_dict()
    assert all(torch.equal(state[k], v) for k, v in unet.state_dict().items())
    assert state["conv_in.weight"].dtype == (torch.float16 if variant else torch.float32)
    if sharded:
        next(path for path in (root / "unet").glob("*-00002-of-*")).unlink()
        with pytest.raises(ValueError, match="is missing"):
            load.load_sdxl(root)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_weights_are_the_files_own_pages(folder):
    """Assigned, not copied: every weight lies where the system has mapped the file."""
    unet = load.load_sdxl(folder).unet
    path = str((folder / "unet" / "diffusion_pytorch_model.safetensors").resolve())
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(path)]
    spans = [(int(a, 16), int(b, 16)) for a, b in ranges]
    assert spans
    for name, p in unet.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in spans), name
