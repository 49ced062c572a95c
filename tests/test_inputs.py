"""What sample.py is handed: models of another kind, broken files, headers, changed contents."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import tdd
from common import cli, files
from common.pictures import control_pixels
from sdxl import keys, load, png
from sdxl.load import ModelPaths
from sdxl.lora import LoRA
from sdxl.lora_files import write_diffusers
from sdxl.recipe import read_recipe
from tests.oracles import UNET, close, ours, randomise, run_sample


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def refused(monkeypatch, capsys, root, *words):
    """The one line on stderr with which sample.py refuses."""
    flags = ["--prompt", "a", "--device", "cpu", "--height", 64, "--width", 64, "--steps", 1]
    code, _, err = run_sample(monkeypatch, capsys, "--model", root, *flags, *words)
    assert (code, err.count("\n")) == (2, 1), err
    return err


# -------------------------------------------------------------------------- what a model predicts


SCHEDULERS = [
    ({"prediction_type": "v_prediction"}, "v-prediction"),
    ({"rescale_betas_zero_snr": True}, "another noise schedule"),
    ({"beta_end": 0.02}, "another noise schedule"), ({"beta_schedule": "linear"}, "another noise"),
    ({"num_train_timesteps": 4000}, "another noise schedule"),
    ({"trained_betas": [0.1, 0.2]}, "another noise schedule"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "another noise schedule"),
    ({"prediction_type": "sample"}, "another noise"), ({"beta_start": "0.00085"}, "another noise"),
    ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "another kind of diffusion"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "another kind of diffusion"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "said"), SCHEDULERS)
def test_another_schedule_in_the_folder_is_refused(entries, said, tmp_path):
    published = {
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1,
        "prediction_type": "epsilon", "trained_betas": None, "timestep_spacing": "leading",
    }  # fmt: skip
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(published))
    load.check_scheduler(path)
    path.write_text(json.dumps(published | entries))
    with pytest.raises(ValueError, match=said):
        load.check_scheduler(path)


@pytest.mark.parametrize(
    "how",
    [
        "modelspec.prediction_type",
        "modelspec.predict_key",
        "v_pred",
        "ztsnr",
        "edm_vpred.sigma_max",
        "edm_mean",
    ],
)
def test_v_prediction_of_a_single_file_is_refused(
    how, folder, single, monkeypatch, capsys, tmp_path
):
    """Its own header, or a marker key as NoobAI's and ComfyUI's files have them."""
    tensors, metadata = load_file(single), {"modelspec.prediction_type": "epsilon"}
    if how.startswith("modelspec"):
        metadata[how] = "v"
    else:
        tensors[how] = torch.zeros(1)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    words = ["--tokenizer", folder / "tokenizer"]
    assert "only eps-prediction is supported" in refused(monkeypatch, capsys, path, *words)
    # So is a UNet of that kind in the place of an eps-predicting one.
    assert "only eps-prediction" in refused(monkeypatch, capsys, folder, "--unet", path)
    # Its autoencoder is SDXL's all the same.
    expected = load.load_sdxl(folder).vae.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in load.load_vae(path).state_dict().items())


def test_v_prediction_of_a_unets_folder_is_refused(folder, tmp_path):
    """--unet MODEL/unet: the model's scheduler beside it says what the UNet predicts."""
    shutil.copytree(folder / "unet", tmp_path / "unet")
    load.load_sdxl(ModelPaths(folder, unet=tmp_path / "unet"))
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text('{"prediction_type": "v_prediction", "rescale_betas_zero_snr": null}')
    with pytest.raises(ValueError, match="this model is of v-prediction"):
        load.load_sdxl(ModelPaths(folder, unet=tmp_path / "unet"))


@pytest.mark.parametrize(
    "name",
    [keys.UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k_ip.weight",
     keys.VAE + "decoder.time_stack.weight", keys.TEXT_1 + "text_model.x", keys.TEXT_2 + "x",
     "cond_stage_model.x"],
)  # fmt: skip
def test_tensors_that_sdxl_has_no_place_for_are_refused(name, folder, single, tmp_path):
    tensors, path = load_file(single), tmp_path / "model.safetensors"
    save_file({**tensors, name: torch.ones(1)}, path)
    with pytest.raises(ValueError, match=f"holds 1 tensors unknown to SDXL: {name}"):
        load.load_sdxl(path, folder / "tokenizer")


def test_a_projection_in_transformers_layout(folder, single, tmp_path):
    """Some converters write the second encoder's projection as NAME.weight, not transposed."""
    tensors, path = load_file(single), tmp_path / "model.safetensors"
    name = keys.TEXT_2 + "text_projection"
    tensors[f"{name}.weight"] = tensors.pop(name).T.contiguous()
    save_file(tensors, path)
    got = load.load_sdxl(path, folder / "tokenizer").encoder_2.text_projection.weight
    assert torch.equal(got, load.load_sdxl(folder).encoder_2.text_projection.weight)


# ----------------------------------------------------------------------------- not-a-number


PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("part", PARTS)
def test_nan_in_a_weight_is_refused_by_file_and_tensor(part, folder, monkeypatch, capsys, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    (path,) = (root / part).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    for value in (torch.nan, -torch.inf):
        tensors[name].view(-1)[-1] = value
        save_file(tensors, path)
        err = refused(monkeypatch, capsys, root)
        assert f"{path}: its tensor {name.removeprefix('text_model.')}" in err.replace(
            "tensor text_model.", "tensor "
        )


def test_what_fp16_cannot_hold_is_refused_and_bf16_can(folder, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    path = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e5  # fp16 ends at 65,504
    save_file(tensors, path)
    load.load_sdxl(root, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"conv_in.bias .* too large for fp16: use --dtype bf16"):
        load.load_sdxl(root, dtype=torch.float16)


def test_whole_numbers_are_no_weights(folder, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    path = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"].to(torch.int8)}, path)
    with pytest.raises(ValueError, match=r"1 of whole numbers, as quantised .*: conv_in.weight"):
        load.load_sdxl(root)


def test_four_bits_are_no_weights(tmp_path):
    path, packed = tmp_path / "x.safetensors", torch.zeros(4, 4, dtype=torch.uint8)
    save_file({"conv_in.bias": packed.view(torch.float4_e2m1fn_x2)}, path)
    with pytest.raises(ValueError, match=r"x.safetensors: its tensor conv_in.bias is of .*float4"):
        files.check_finite(path, files.read_tensors(path)[0])


def test_latents_that_are_not_finite_are_no_picture(folder, monkeypatch, capsys, tmp_path):
    """A LoRA at a scale that overflows: nothing black is written, nor kept as finished."""
    lora = LoRA.init(load.load_sdxl(folder).unet, 4, 4, torch.Generator().manual_seed(0))
    for adapter in lora.adapters.values():
        adapter.up.data.fill_(1e30)
    write_diffusers(tmp_path / "lora.safetensors", lora)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "set"
    prompts.write_text("a fox\n")
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--prompts"]
    words += [prompts, "--output", out, "--lora", f"{tmp_path / 'lora.safetensors'}:1e8"]
    code, _, err = run_sample(monkeypatch, capsys, *words)
    assert (code, "NaN or infinite; try --dtype float32" in err) == (2, True), err
    assert not list(out.iterdir())


# --------------------------------------------------------------------------- files of another kind


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 51\n", "git lfs"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"PK\x03\x04\x00\x00archive/data.pkl", "is a pickle"), (b"\x80\x02}q\x00.", "is a pickle"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"), (b"", "no whole safetensors file"),
        # The length of a header may begin with any byte.
        (b"<!\0\0\0\0\0\0{\"a\":1", "no whole safetensors file"),
    ],
)  # fmt: skip
def test_what_stands_in_the_place_of_weights_is_named(
    content, said, folder, monkeypatch, capsys, tmp_path
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for flag in ("--lora", "--unet", "--vae", "--controlnet"):
        words = [flag, path]
        if flag == "--controlnet":
            Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
            words += ["--control-image", tmp_path / "edges.png"]
        err = refused(monkeypatch, capsys, folder, *words)
        assert said in err and str(path) in err, (flag, err)


def test_a_folder_in_the_place_of_a_lora(folder, monkeypatch, capsys, tmp_path):
    """With one LoRA in it, it is that one; with none or two it is refused."""
    lora = LoRA.init(load.load_sdxl(folder).unet, 4, 4, torch.Generator().manual_seed(0))
    for adapter in lora.adapters.values():
        adapter.up.data.normal_(generator=torch.Generator().manual_seed(1))
    inside = tmp_path / "run"
    inside.mkdir()
    assert "0 .safetensors in it" in refused(monkeypatch, capsys, folder, "--lora", inside)
    write_diffusers(inside / "a.safetensors", lora)
    words = ["--prompt", "a fox", "--steps", 1, "--lora"]
    one = ours(monkeypatch, capsys, folder, tmp_path, *words, inside)
    assert torch.equal(
        one, ours(monkeypatch, capsys, folder, tmp_path, *words, inside / "a.safetensors")
    )
    write_diffusers(inside / "b.safetensors", lora)
    assert "2 .safetensors in it" in refused(monkeypatch, capsys, folder, "--lora", inside)


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuda", "host", "torch-cpu", "cublas"],
)  # fmt: skip
def test_out_of_memory_says_what_to_lower(problem, monkeypatch, capsys):
    def main(args):
        raise problem

    monkeypatch.setattr("sys.argv", ["sample.py", "--model", "x"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, sample.parser())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert (
        "out of memory: lower --batch-size, lower --height, lower --width, add --low-memory" in err
    )


def test_this_machines_own_memory_error_is_known():
    """What torch really raises here for 2^60 bytes, and an error of another kind."""
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**58, dtype=torch.float32)
    assert cli.is_out_of_memory(refusal.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not cli.is_out_of_memory(other.value)


def test_toy_runs_where_unix_modules_are_missing(tmp_path):
    """Windows has none of these: the 2-D experiment's and CIFAR-10's modules import without."""
    missing = ["resource", "fcntl", "termios", "pwd", "grp"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import train_toy, cifar.train"
    )
    code += "; from training.log import peak_memory_gib as peak; assert peak('cpu') != peak('cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------ parts


def spelled(single, prefix, keep_prefix):
    tensors = {k: v for k, v in load_file(single).items() if k.startswith(prefix)}
    return tensors if keep_prefix else {k.removeprefix(prefix): v for k, v in tensors.items()}


@pytest.mark.parametrize("how", ["folder", "diffusers", "original", "bare", "checkpoint"])
def test_another_unet_is_read_in_any_form(how, folder, single, tmp_path):
    """A UNet of other weights in the base's place, from a folder or a file in any names."""
    weights = {
        "folder": lambda: folder / "unet",
        "diffusers": lambda: load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "original": lambda: spelled(single, keys.UNET, True),
        "bare": lambda: spelled(single, keys.UNET, False), "checkpoint": lambda: load_file(single),
    }[how]()  # fmt: skip
    if isinstance(weights, dict):
        save_file(weights, tmp_path / "unet.safetensors")
        weights = tmp_path / "unet.safetensors"
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    expected, path = load.load_sdxl(folder).unet.state_dict(), base / "unet"
    path /= "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    model = load.load_sdxl(ModelPaths(base, unet=weights))
    assert all(torch.equal(model.unet.state_dict()[k], v) for k, v in expected.items())
    with pytest.raises(ValueError, match="not an SDXL UNet"):
        load.load_sdxl(ModelPaths(base, unet=folder / "vae"))


def test_a_merge_without_a_vae_takes_one_from_elsewhere(
    folder, single, monkeypatch, capsys, tmp_path
):
    tensors = load_file(single)
    merge, bare = tmp_path / "merge.safetensors", tmp_path / "vae.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith(keys.VAE)}, merge)
    # What published VAE files carry beside the weights.
    extras = {"model_ema.decay": torch.ones(()), "loss.logvar": torch.ones(())}
    save_file(spelled(single, keys.VAE, False) | extras, bare)
    words = ["--tokenizer", folder / "tokenizer"]
    assert "holds no VAE: name one with --vae" in refused(monkeypatch, capsys, merge, *words)
    words += ["--prompt", "a fox", "--steps", 1]
    expected = load.load_sdxl(folder).vae.state_dict()
    for vae in (bare, single, folder / "vae"):
        ours(monkeypatch, capsys, merge, tmp_path, *words, "--vae", vae)
        got = load.load_vae(vae).state_dict()
        assert all(torch.equal(got[k], v) for k, v in expected.items())


def test_a_vae_of_stable_diffusion_1_is_refused(folder, tmp_path):
    """It has every name and shape of SDXL's, and another scale of latents."""
    shutil.copytree(folder / "vae", tmp_path / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    with pytest.raises(ValueError, match=r"scaling_factor of 0.18215, not SDXL's 0.13025"):
        load.load_sdxl(ModelPaths(folder, vae=tmp_path / "vae"))


def test_controlnets_of_one_file_and_of_several(folder, monkeypatch, capsys, tmp_path):
    """A file is its folder's network; two of half the strength are one of the whole."""
    shared = {k: v for k, v in UNET.items() if k not in ("out_channels", "up_block_types")}
    randomise(ControlNetModel(**shared), 9).save_pretrained(tmp_path / "control")
    file = tmp_path / "control" / "diffusion_pytorch_model.safetensors"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")

    def latents(*controls):
        words = ["--prompt", "a fox", "--steps", 2]
        for path, scale in controls:
            words += ["--controlnet", path, "--control-image", tmp_path / "edges.png"]
            words += ["--control-scale", scale]
        return ours(monkeypatch, capsys, folder, tmp_path, *words)

    expected = latents((tmp_path / "control", 0.8))
    assert torch.equal(latents((file, 0.8)), expected)
    assert close(latents((file, 0.3), (tmp_path / "control", 0.5)), expected, 1e-5)
    assert not close(latents((file, 0.5)), expected, 1e-2)
    small = shared | {"block_out_channels": (32, 128, 128), "attention_head_dim": (1, 2, 2)}
    ControlNetModel(**small).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small does not fit the model: its channels is \(32,"):
        load.load_controlnet(tmp_path / "small", load.load_sdxl(folder).unet.config)
    for mark, kind in (("lora_controlnet", "Control-LoRA"), ("task_embedding", "ControlNet-Union")):
        save_file({**load_file(file), mark: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"is a {kind}: only"):
            load.load_controlnet(tmp_path / "other.safetensors", load.load_sdxl(folder).unet.config)


def test_a_control_image_of_another_shape_is_said_to_be_stretched(tmp_path, capsys):
    Image.new("RGB", (100, 50)).save(tmp_path / "edges.png")
    assert control_pixels(tmp_path / "edges.png", 64, 32).shape == (1, 3, 32, 64)
    assert not capsys.readouterr().err
    control_pixels(tmp_path / "edges.png", 64, 64)
    assert "100 x 50 is stretched to 64 x 64" in capsys.readouterr().err


# --------------------------------------------------------------------------- what a header says


RECIPES = [
    ({"tdd_method": "tdd", "tdd_K": "4-8", "tdd_w": "3.5", "tdd_tcf": "1"},
     {"cfg": 2, "gamma": 0.2, "steps": 4, "kmin": 4, "kmax": 8, "tune_guidance": 4.5, "tcf": "1"}),
    ({"tdd_method": "tdm", "tdd_K": "[1, 2, 4]", "tdd_w": "7.0"},
     {"cfg": 1, "gamma": 0, "steps": 4, "kmin": 1, "kmax": 4, "tune_guidance": 8}),
    ({"tdd_method": "tdm", "tdd_K": "[3]", "tdd_solver": "dpm++2m"},
     {"cfg": 1, "gamma": 0, "steps": 3, "kmin": 3, "kmax": 3, "sampler": "dpm++2m"}),
    # DDIM is the gamma-sampler at gamma = 0.
    ({"tdd_method": "tdm", "tdd_solver": "ddim"}, {"cfg": 1, "gamma": 0, "sampler": "tdd"}),
    ({"tdd_method": "cm", "tdd_solver": "dpm2s"}, {"cfg": 1, "gamma": 1}),
    # Of a range every K counts, not its ends alone.
    ({"tdd_method": "tdd", "tdd_K": "2-8"},
     {"cfg": 2, "gamma": 0.2, "steps": 4, "kmin": 2, "kmax": 8}),
    ({"tdd_method": "tdd", "tdd_K": "2-3"},
     {"cfg": 2, "gamma": 0.2, "steps": 3, "kmin": 2, "kmax": 3}),
    ({"tdd_method": "tdd", "tdd_K": "6-8"},
     {"cfg": 2, "gamma": 0.2, "steps": 6, "kmin": 6, "kmax": 8}),
    ({"tdd_method": "pcm", "tdd_K": "6", "tdd_solver_steps": "50"},
     {"cfg": 1.6, "gamma": 0, "steps": 6, "kmin": 6, "kmax": 6, "solver_steps": 50}),
    ({"tdd_method": "pcm", "tdd_K": "4-8"},
     {"cfg": 1.6, "gamma": 0, "steps": 4, "kmin": 4, "kmax": 4}),
    ({"tdd_method": "tcd", "tdd_w": "[2.0, 14.0]"}, {"cfg": 1, "gamma": 0.2, "tune_guidance": 9}),
    # A list, in any order: 4 steps, or the fewest above, or the most below.
    ({"tdd_method": "tdd", "tdd_K": "[1, 2, 3, 4, 5, 6, 7, 8]"},
     {"cfg": 2, "gamma": 0.2, "steps": 4, "kmin": 1, "kmax": 8}),
    ({"tdd_method": "tdd", "tdd_K": "[8, 4]"},
     {"cfg": 2, "gamma": 0.2, "steps": 4, "kmin": 4, "kmax": 8}),
    ({"tdd_method": "tdd", "tdd_K": "[8, 6, 2]"},
     {"cfg": 2, "gamma": 0.2, "steps": 6, "kmin": 2, "kmax": 8}),
    ({"tdd_method": "tdd", "tdd_K": "[2, 3]"},
     {"cfg": 2, "gamma": 0.2, "steps": 3, "kmin": 2, "kmax": 3}),
    ({"tdd_method": "cm"}, {"cfg": 1, "gamma": 1}),
    ({"tdd_method": "cm", "tdd_gamma": "0.5", "tdd_cfg": "1.5"}, {"cfg": 1.5, "gamma": 0.5}),
    ({"ss_network_dim": "8"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("header", "expected"), RECIPES)
def test_a_header_says_how_to_sample(header, expected, tmp_path):
    assert read_recipe(tmp_path, header) == pytest.approx(expected)


@pytest.mark.parametrize(
    "header",
    [
        {"tdd_method": "lcm++"}, {"tdd_w": "NaN"}, {"tdd_w": "[1, 2, 3]"}, {"tdd_w": '"7"'},
        {"tdd_w": "[" * 100_000}, {"tdd_method": "tdd", "tdd_K": "many"}, {"tdd_tcf": "3"},
        {"tdd_w": "1" + "0" * 400}, {"tdd_method": "tdm", "tdd_solver": "euler"},
        {"tdd_method": "tdd", "tdd_K": "8-4"}, {"tdd_method": "pcm", "tdd_K": "0"},
        {"tdd_solver_steps": "1e3"}, {"tdd_gamma": "2"},
    ],
)  # fmt: skip
def test_a_broken_header_is_refused(header, tmp_path):
    with pytest.raises(ValueError, match="its header is broken, tdd_"):
        read_recipe(tmp_path, header)


def test_flags_not_given_are_the_files(folder, monkeypatch, capsys, tmp_path):
    """A TDM file is sampled at g = 1 and gamma = 0; what a flag says wins; two must agree."""
    lora = LoRA.init(load.load_sdxl(folder).unet, 4, 4, torch.Generator().manual_seed(0))
    tdm, pcm = tmp_path / "tdm.safetensors", tmp_path / "pcm.safetensors"
    write_diffusers(
        tdm, lora, tdd_method="tdm", tdd_K="[2, 6]", tdd_w="7.0", tdd_solver_steps="200"
    )
    write_diffusers(pcm, lora, tdd_method="pcm", tdd_K="5")

    def config(*words):
        args = sample.parser().parse_args(["--model", "x", "--prompt", "a", *map(str, words)])
        sample.check(args)
        return sample.build_config(args)

    got = config("--lora", tdm, "--schedule", "nonequidistant")
    assert (got.steps, got.w, got.gamma, got.solver_steps) == (6, 0, 0, 200)
    assert got.timesteps == tdd.equidistant(6, 200)  # all of K_max's
    of_four = config("--lora", tdm, "--schedule", "nonequidistant", "--steps", 4).timesteps
    assert of_four == sorted({999, 499, *tdd.equidistant(6, 200)[1:3]}, reverse=True)
    assert (
        "from the header of tdm.safetensors: steps 6, cfg 1.0, gamma 0.0" in capsys.readouterr().out
    )
    got = config("--lora", tdm, "--cfg", 3, "--gamma", 0.5, "--steps", 2, "--tune-guidance")
    assert (got.steps, got.w, got.gamma, got.w_distilled) == (2, 2, 0.5, 7)
    assert config("--lora", tdm, "--tune-guidance", 4.5).w_distilled == 3.5
    negative = ["--lora", tdm, "--negative-prompt", "b"]
    assert config(*negative, "--cfg", 2).w == 1
    solver = tmp_path / "solver.safetensors"
    write_diffusers(solver, lora, tdd_method="tdm", tdd_solver="dpm++2m")
    assert config("--lora", solver).sampler == "dpm++2m"
    assert config("--lora", solver, "--sampler", "tdd").gamma == 0
    plain = config()
    assert (plain.steps, plain.w, plain.gamma, plain.w_distilled) == (4, 1, 0.2, None)
    # Where they differ, the line names a flag that there is, and only for what is used.
    both = ["--lora", pcm, "--lora", tdm, "--steps", 4, "--cfg", 2, "--gamma", 0]
    assert config(*both, "--solver-steps", 250).timesteps == tdd.equidistant(4, 250)
    write_diffusers(tmp_path / "s.safetensors", lora, tdd_tcf="s")
    write_diffusers(tmp_path / "1.safetensors", lora, tdd_tcf="1")
    tcfs = ["--lora", tmp_path / "s.safetensors", "--lora", tmp_path / "1.safetensors"]
    for words, said in (
        (["--lora", pcm, "--lora", tdm], r"trained for 5 and 6: give --steps"),
        ([*both, "--schedule", "nonequidistant"], "trained for 2 and 5: give one of them"),
        (tcfs, "trained for 1 and s: give one of them"),
        ([*tcfs, "--tcf", "1"], "trained for 1 and s: give one of them"),
        (["--lora", pcm, "--tune-guidance"], "no header says a value: give it as a number"),
        (["--tune-guidance"], "no header says a value"),
        (negative, "no effect at --cfg 1, as the header has it: give a larger --cfg"),
        (["--lora", solver, "--gamma", 0.5], "--gamma is for --sampler tdd"),
    ):
        with pytest.raises(ValueError, match=said):
            config(*words)


def test_a_unets_header_and_its_scalar(folder, monkeypatch, capsys, tmp_path):
    """A student that was trained as a whole, by train_sdxl.py --full --tcf s."""
    unet = tmp_path / "unet"
    shutil.copytree(folder / "unet", unet)
    path, config = unet / "diffusion_pytorch_model.safetensors", unet / "config.json"
    c = UNET["block_out_channels"][0]
    scalar = {f"scalar_embedding.linear_{i}.bias": torch.zeros(4 * c) for i in (1, 2)}
    scalar |= {f"scalar_embedding.linear_{i + 1}.weight": torch.zeros(4 * c, (c, 4 * c)[i])
               for i in (0, 1)}  # fmt: skip
    save_file(load_file(path) | scalar, path, {"tdd_method": "cm", "tdd_tcf": "1"})
    content = json.loads(config.read_text()) | {"scalar": "target_time"}
    config.write_text(json.dumps(content))
    for words in (["--unet", unet], ["--unet", path]):
        args = sample.parser().parse_args(["--model", "x", "--prompt", "a", *map(str, words)])
        sample.check(args)
        assert (args.cfg, args.gamma, args.tcf) == (1, 1, "1")
        assert "takes a target time: give --tcf s" in refused(monkeypatch, capsys, folder, *words)


def test_a_prompt_that_is_cut_is_shown_with_its_end(folder, monkeypatch, capsys, tmp_path):
    """The tiny vocabulary has a token a letter: 75 of these 78 fit, in either prompt."""
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--steps", 1]
    words += ["--output", tmp_path / "x.png", "--num-images", 2, "--output", tmp_path / "set"]
    long, longer = " ".join(["abc"] * 25 + ["def"]), " ".join(["abc"] * 25 + ["Fox", "xyz"])
    prompts = ["--prompt", "a", "--prompt", long, "--negative-prompt", longer]
    code, _, err = run_sample(monkeypatch, capsys, *words, *prompts)
    lines = [line for line in err.splitlines() if line.startswith("prompt ")]
    assert code == 0 and [line.partition("..: ")[2] for line in lines] == [
        "cut before 'fox xyz', 75 tokens fit", "cut before 'def', 75 tokens fit"
    ]  # fmt: skip


# ------------------------------------------------------------------------ known by its content


def test_pictures_are_known_by_the_content_they_were_made_of(folder, monkeypatch, capsys, tmp_path):
    """A moved model makes the same pictures; another content under the same path does not."""
    root, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(folder, root)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "set"
    prompts.write_text("a fox\n")
    lora = tmp_path / "lora.safetensors"
    fresh = LoRA.init(load.load_sdxl(folder).unet, 4, 4, torch.Generator().manual_seed(0))
    write_diffusers(lora, fresh)

    def call(model, lora):
        words = ["--device", "cpu", "--height", 64, "--width", 64, "--steps", 1, "--prompts"]
        words += [prompts, "--output", out, "--lora", lora]
        return run_sample(monkeypatch, capsys, "--model", model, *words)

    assert "1 pictures sampled" in call(root, lora)[1]
    root.rename(elsewhere)
    moved = lora.rename(tmp_path / "renamed.safetensors")
    assert "0 pictures sampled" in call(elsewhere, moved)[1]
    # The old path as a link to the new place.
    root.symlink_to(elsewhere)
    assert "0 pictures sampled" in call(root, moved)[1]
    assert "made with another lora 1: name another" in call(root, f"{moved}:0.5")[2]
    for part in PARTS:
        (path,) = (elsewhere / part).glob("*.safetensors")
        whole = path.read_bytes()
        tensors = load_file(path)
        tensors[max(tensors)].add_(1e-3)
        save_file(tensors, path, metadata_of(path))
        code, _, err = call(root, moved)
        assert (code, f"was made with another {part}: name another --output" in err) == (2, True)
        path.write_bytes(whole)
    assert "0 pictures sampled" in call(root, moved)[1]


def test_fingerprints_are_of_the_files_that_are_loaded(folder, tmp_path):
    """Of a folder with both precisions: the VAE's is float32 whatever --dtype says."""
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    for part in PARTS:
        (path,) = (root / part).glob("*.safetensors")
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    paths, before = ModelPaths(root), {}
    for dtype in (torch.float32, torch.float16):
        before[dtype] = paths.fingerprints(dtype)
    for part in PARTS:
        path = next(p for p in (root / part).glob("*.safetensors") if "fp16" not in p.name)
        path.write_bytes(path.read_bytes() + b" ")
    changed = {d: {p for p in PARTS if paths.fingerprints(d)[p] != before[d][p]} for d in before}
    assert changed == {torch.float32: {*PARTS}, torch.float16: {"vae"}}


def test_fingerprints_are_of_what_takes_a_parts_place(folder, tmp_path):
    before = ModelPaths(folder).fingerprints()
    for part in ("unet", "vae", "tokenizer"):
        copy = tmp_path / part
        shutil.copytree(folder / part, copy)
        assert ModelPaths(folder, **{part: copy}).fingerprints() == before
        path = copy / "added_tokens.json" if part == "tokenizer" else next(copy.glob("*.safet*"))
        path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")
        after = ModelPaths(folder, **{part: copy}).fingerprints()
        assert {name for name in before if before[name] != after[name]} == {part}


def test_contents_of_loras_and_controlnets(folder, tmp_path):
    """Each counts by what is in it; the same LoRA twice, even under two names, is a mistake."""
    lora, image, control = (tmp_path / name for name in ("a.safetensors", "x.png", "control"))
    write_diffusers(lora, LoRA.init(load.load_sdxl(folder).unet, 4, 4, torch.Generator()))
    Image.new("RGB", (8, 8)).save(image)
    shutil.copytree(folder / "vae", control)

    def contents(*words):
        words = ["--model", folder, "--prompt", "a", "--device", "cpu", *words]
        return sample.read_contents(sample.parser().parse_args(list(map(str, words))))

    flags = ["--lora", lora, "--controlnet", control, "--control-image", image]
    before = contents(*flags)
    for path, name in ((image, "control image 1"), (control / "config.json", "controlnet 1")):
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        assert {k for k, v in contents(*flags).items() if v != before[k]} == {name}
        path.write_bytes(whole)
    assert contents(*flags) == before
    shutil.copy(lora, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="is given twice: give it once, with the scales' sum"):
        contents(*flags, "--lora", f"{tmp_path / 'b.safetensors'}:0.5")


def test_tokenizers_of_another_model_are_refused(folder, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    shutil.copytree(folder / "tokenizer", root / "tokenizer_2")
    load.load_sdxl(root)
    ids = json.loads((root / "tokenizer" / "vocab.json").read_text()).values()
    added = json.dumps({"<sks>": max(ids) + 1})
    (root / "tokenizer_2" / "added_tokens.json").write_text(added)
    with pytest.raises(ValueError, match="tokenizer and tokenizer_2 differ in '<sks>'"):
        load.load_sdxl(root)
    (root / "tokenizer" / "added_tokens.json").write_text(added)
    with pytest.raises(ValueError, match=r"'<sks>' is number .* they are not of one model"):
        load.load_sdxl(root)


def test_fingerprint_sees_one_changed_layer_of_a_large_file(tmp_path):
    """12 MB, more than is read whole: each of 300 tensors is seen, the header and the size too."""
    tensors = {f"layer.{i}": torch.full((100, 100), float(i)) for i in range(300)}
    path, copy = tmp_path / "a.safetensors", tmp_path / "another name.safetensors"
    save_file(tensors, path)
    before = files.fingerprint(path)
    shutil.copy(path, copy)
    assert files.fingerprint(copy) == before
    for i in range(0, 300, 37):
        for row in (0, 50):  # of a hundred: where a tensor begins, and its middle
            changed = tensors[f"layer.{i}"].clone()
            changed[row] += 1
            save_file({**tensors, f"layer.{i}": changed}, path)
            assert files.fingerprint(path) != before
    save_file(tensors, path, {"tdd_method": "tdm"})
    assert files.fingerprint(path) != before
    save_file(tensors, path)
    assert files.fingerprint(path) == before
    assert files.fingerprint(path, copy) not in (before, files.fingerprint(copy, path, copy))


def test_of_a_misnamed_file_only_blocks_are_read(tmp_path):
    """A pickle's first bytes are no header's length; nor is a length above safetensors' limit."""
    path, size = tmp_path / "x.safetensors", 200_000_000
    for start in (b"PK\x03\x04\0\0archive", (100_000_001).to_bytes(8, "little"), b"\x80\x02" * 8):
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(size)
        parts = files._sampled_parts(path, size)
        assert sum(length for _, length in parts) == files.BLOCKS * 4096
    with open(path, "wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(size)
    assert (0, 100_000_008) in files._sampled_parts(path, size)


# --------------------------------------------------------------------------------- where to write


def test_two_machines_try_the_same_folder_at_once(monkeypatch, tmp_path):
    """Their processes may have the same number; the other's try falls into this one's."""
    touch = files.Path.touch

    def touch_beside_another(path):
        touch(path)
        with monkeypatch.context() as patch:
            patch.setattr(files.Path, "touch", touch)
            files.output_folder(tmp_path)

    monkeypatch.setattr(files.Path, "touch", touch_beside_another)
    assert files.output_folder(tmp_path) == tmp_path and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "several", "expected"),
    [
        ("x.png", False, True), ("x.PNG", False, True), ("out", False, False),
        ("out/", False, False), ("x.png/", False, False), ("runs/v1.5", False, False),
        ("out", True, False), ("a.jpg", False, "name it .png"), ("x.webp", True, "name it .png"),
        ("x.png", True, "several pictures need a folder"),
    ],
)  # fmt: skip
def test_output_is_a_png_or_a_folder(output, several, expected, tmp_path):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            png.names_png(f"{tmp_path}/{output}", several)
    else:
        assert png.names_png(f"{tmp_path}/{output}", several) == expected


def test_a_folder_for_a_single_picture(folder, monkeypatch, capsys, tmp_path):
    words = ["--model", folder, "--device", "cpu", "--height", 64, "--width", 64, "--steps", 1]
    out = f"{tmp_path}/out/"
    assert run_sample(monkeypatch, capsys, *words, "--prompt", "a", "--output", out)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.png"]
