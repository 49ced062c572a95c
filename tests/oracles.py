"""A tiny SDXL on disk, and diffusers, transformers and peft as independent references."""

import json
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sample
from sdxl import keys, load
from sdxl.lora import LoRA
from sdxl.num_steps import KAdapter, add_k_adapter
from tcd import TCF
from tdd import targets_of
from tests import helpers
from tests.helpers import ALPHA, SCHEDULE, SIGMA, randn, toy_eps
from training import build
from training.adversarial import Discriminator
from training.distill import TDDConfig, TDDStep, TDMConfig, TDMStep


def diffusers_run(scheduler, k, x_t, model=toy_eps, **step_options):
    """The states x after each step of a diffusers scheduler, and its timesteps."""
    states = []
    for t in scheduler.timesteps[:k]:
        eps = model(x_t, t.expand(len(x_t)))
        x_t = scheduler.step(eps, t, x_t, **step_options).prev_sample
        states.append(x_t)
    return states


UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 128, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 48,
}  # fmt: skip


VAE = {
    "block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
}  # fmt: skip


LETTERS = "abcdefghijklmnopqrstuvwxyz,.!0123456789"


def randomise(module, seed):
    """Every weight, norm and bias off its default, and outputs still of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise / math.prod(p.shape[1:]) ** 0.5
        else:
            p.data = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval().requires_grad_(False)


def text_config(hidden, **more):
    return CLIPTextConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3,
        num_attention_heads=hidden // 64, vocab_size=len(vocabulary()), max_position_embeddings=77,
        bos_token_id=len(vocabulary()) - 2, eos_token_id=len(vocabulary()) - 1, **more,
    )  # fmt: skip


def vocabulary():
    tokens = ["!"] + [c for c in LETTERS if c != "!"] + [f"{c}</w>" for c in LETTERS]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def networks():
    text_1 = CLIPTextModel(text_config(64, hidden_act="quick_gelu"))
    text_2 = CLIPTextModelWithProjection(text_config(64, hidden_act="gelu", projection_dim=48))
    modules = [UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), text_1, text_2]
    return [randomise(module, seed) for seed, module in enumerate(modules)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder written by diffusers and transformers, with published names."""
    root = tmp_path_factory.mktemp("sdxl")
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    for name, module in zip(parts, networks(), strict=True):
        module.save_pretrained(root / name)
    # Published folders have the prefix that transformers 5 leaves out.
    weights, published = root / "text_encoder" / "model.safetensors", {}
    for name, tensor in load_file(weights).items():
        published[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file(published, weights, {"format": "pt"})
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary()))
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return root


@pytest.fixture(scope="session")
def single(folder, tmp_path_factory):
    """The same model as one file in the original names, with the extras that real files carry."""
    model, tensors = load.load_sdxl(folder), {}
    parts = [
        (keys.UNET, model.unet, keys.unet_modules(model.unet.config)),
        (keys.VAE, model.vae, keys.vae_modules(model.vae.config)),
        (keys.TEXT_1, model.encoder_1, {}),
        (keys.TEXT_2, model.encoder_2, keys.text_modules(model.encoder_2.config)),
    ]
    for prefix, module, table in parts:
        state = module.state_dict()
        for name, tensor in state.items():
            key = prefix + keys.to_original_key(name, table)
            if ".in_proj_" in key:  # q, k, v follow each other in one tensor
                if "q_proj" not in name:
                    continue
                qkv = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
                tensor = torch.cat([state[n] for n in qkv])
            elif key.endswith(".text_projection"):
                tensor = tensor.T
            elif ".attn_1." in key and "norm" not in key and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[key] = tensor.contiguous().clone()
    tensors["model_ema.decay"] = torch.ones(())
    tensors["denoiser.sigmas"] = torch.ones(1000)
    tensors["alphas_cumprod"] = torch.ones(1000)
    tensors[keys.TEXT_1 + "text_projection.weight"] = torch.ones(2, 2)
    tensors[keys.TEXT_1 + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors[keys.TEXT_2 + "logit_scale"] = torch.ones(())
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(tensors, path)
    return path


def euler_pipeline(folder):
    """Diffusers' pipeline of a tiny SDXL's UNet alone, with the Euler scheduler of docs/sdxl.md."""
    pipeline = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=EulerDiscreteScheduler(
            1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="leading"
        ),
    )  # fmt: skip
    pipeline.vae_scale_factor = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Reference:
    """SDXL from diffusers' and transformers' own modules, and Eqs. 12-18 spelt out."""

    def __init__(self, folder):
        from transformers import CLIPTokenizer

        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.encoders = [
            CLIPTextModel(text_config(64, hidden_act="quick_gelu")).eval(),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        ]
        published = load_file(folder / "text_encoder" / "model.safetensors")
        state = self.encoders[0].state_dict()
        for name in state:
            state[name] = published.get(name, published.get(f"text_model.{name}"))
        self.encoders[0].load_state_dict(state)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)

    def encode(self, prompt):
        end = len(vocabulary()) - 1
        ids = self.tokenizer(prompt, truncation=True, max_length=77).input_ids
        hidden = []
        for encoder, pad in zip(self.encoders, (end, 0), strict=True):
            padded = torch.tensor([ids + [pad] * (77 - len(ids))])
            out = encoder(padded, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
        return torch.cat(hidden, -1), out.text_embeds

    @torch.no_grad()
    def latents(self, prompt, seed, height, width, times, gamma=0.2, cfg=2.0, negative=None,
                tune=None, clip_steps=0, percentile=0.995, highest=1.0, control=None):  # fmt: skip
        cond = self.encode(prompt)
        null = (
            tuple(torch.zeros_like(c) for c in cond) if negative is None else self.encode(negative)
        )
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        generator = torch.Generator().manual_seed(seed)
        shape = 1, 4, height // 8, width // 8
        x = torch.randn(shape, generator=generator)

        def eps(x, t, c):
            added = {"text_embeds": c[1], "time_ids": sizes}
            more = {} if control is None else control(x, t, c[0], added)
            return self.unet(x, t, c[0], added_cond_kwargs=added, **more).sample

        for i, t in enumerate(times):
            e_c, e_u, w = eps(x, t, cond), eps(x, t, null), cfg - 1
            e = (1 + w) * e_c - w * e_u
            if tune is not None:
                # Eq. 13's eps(x_t, t): of the null condition that was trained, not the negative's.
                e_0 = eps(x, t, tuple(torch.zeros_like(c) for c in cond))
                e = (e + tune * e_0) / (1 + tune)
            x_0 = (x - SIGMA[t + 1] * e) / ALPHA[t + 1]
            if i < clip_steps:
                limit = np.quantile(np.abs(x_0.numpy()), percentile).clip(1, highest)
                x_0 = (x_0 / limit).clamp(-1, 1)
                e = (x - ALPHA[t + 1] * x_0) / SIGMA[t + 1]
            if i == len(times) - 1:
                return x_0
            p = times[i + 1]
            s = math.floor(round((1 - gamma) * p, 6))
            x_s, ratio = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * e, ALPHA[p + 1] / ALPHA[s + 1]
            x = x_s if gamma == 0 else (
                ratio * x_s + math.sqrt(1 - ratio**2) * torch.randn(shape, generator=generator)
            )  # fmt: skip


run_sample = partial(helpers.run, sample)


def ours(monkeypatch, capsys, folder, tmp_path, *words):
    flags = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--height", 64]
    flags += ["--width", 72, "--output", tmp_path / "x.png"]
    flags += ["--save-latents", tmp_path / "l.safetensors"]
    code, _, err = run_sample(monkeypatch, capsys, *flags, *words)
    assert code == 0, err
    return load_file(tmp_path / "l.safetensors")["latents"]


def close(a, b, atol=1e-4):
    return (a - b).abs().max() <= atol * b.abs().max()


ALL = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
TAKES_K = ["add_embedding.linear_1", "add_embedding.linear_2"]  # beside them, in a told student


def next_stop(t, K):
    """The largest mT/K at or below an exact time t, by trying them all."""
    return max(Fraction(1000 * m, K) for m in range(K) if Fraction(1000 * m, K) <= t)


def reference_draws(method, N, b, shape, eta, rho, generator, Ks=()):
    """Lines 8, 9 and 11 from the same uniforms: t_{n+1}, t_n, tau~, K, keep_prompt; and the noise.

    Ks: what --ks has, for each of which the next stop is a target; K is 0 without.
    """
    u = torch.rand((4, b), generator=generator, dtype=torch.float64).T.tolist()
    rows, per_n = [], 1000 // N
    for u_n, u_tau, u_eta, u_keep in u:
        n = int(u_n * N)
        t = Fraction(1000 * n, N)
        times = {
            "cm": [Fraction(0)],
            "pcm": [next_stop(t, 4)],
            "tcd": [Fraction(1000 * m, N) for m in range(n + 1)],
            "tdd": sorted(
                {Fraction(1000 * m, k) for k in range(4, 9) for m in range(k)
                 if t - 250 <= Fraction(1000 * m, k) <= t}
            ),
        }[method]  # fmt: skip
        K = Ks[int(u_tau * len(Ks))] if Ks else 0
        tau = next_stop(t, K) if Ks else times[int(u_tau * len(times))]
        tau = 0 if tau == 0 else math.ceil(tau / per_n) * per_n - 1
        # Eq. 8 over the whole timesteps from (1 - eta) tau to tau, both of them included.
        lowest = math.ceil((1 - Fraction(str(eta))) * tau)
        tau = lowest + int(u_eta * (tau - lowest + 1))
        rows.append(((n + 1) * per_n - 1, max(n * per_n - 1, 0), tau, K, u_keep >= rho))
    return rows, torch.randn(shape, generator=generator)


class Theirs:
    """Diffusers' UNet with peft adapters holding the same LoRA weights as ours.

    Where they take K, they are told it as crop_top = 8 K, and the plain UNet the crop (0, 0).
    """

    def __init__(self, folder, loras, rank, alpha, dtype):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.is_told = any(TAKES_K[0] in lora.adapters for lora in loras.values())
        for name, lora in loras.items():
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ALL)
            if self.is_told:
                pattern = {TAKES_K[0]: len(lora.adapters[TAKES_K[0]].down)}  # its scale is 1
                config = LoraConfig(
                    r=rank, lora_alpha=alpha, target_modules=[*ALL, *TAKES_K],
                    rank_pattern=pattern, alpha_pattern=pattern,
                )  # fmt: skip
            self.unet.add_adapter(config, name)
        self.unet.to(dtype).requires_grad_(False)
        self.params, self.learns = {}, {"student"}
        for name, lora in loras.items():
            for layer, adapter in lora.adapters.items():
                module = self.unet.get_submodule(layer)
                for part, p in (("lora_A", adapter.down), ("lora_B", adapter.up)):
                    weight = getattr(module, part)[name].weight
                    weight.data = p.detach().clone()
                    self.params[name, layer, part] = weight.requires_grad_(name == "student")

        self.scalar_weights = {}
        for name, lora in loras.items():
            if lora.scalar_embedding is not None:
                weights = {}
                for k, v in lora.scalar_embedding.state_dict().items():
                    weights[k] = v.detach().clone().requires_grad_(name == "student")
                    self.params[name, "scalar", k] = weights[k]
                self.scalar_weights[name] = weights

    def eps(self, adapter, x, t, c, scalar=None, K=0):
        """scalar: for an adapter's embedding, added to the time embedding's output by a hook."""
        if adapter is None:
            self.unet.disable_adapters()
        else:
            self.unet.enable_adapters()
            self.unet.set_adapter(adapter)
        # peft has only the adapter in use learn.
        for key, p in self.params.items():
            p.requires_grad_(key[0] in self.learns)
        time_ids = c["time_ids"].clone()
        if self.is_told:
            time_ids[:, 2:4] = torch.tensor([8 * K if adapter else 0, 0])
        added = {"text_embeds": c["pooled"], "time_ids": time_ids}
        hooks = []
        if adapter in self.scalar_weights:
            w = self.scalar_weights[adapter]
            waves = get_timestep_embedding(torch.tensor([scalar]), 64, True, 0).to(x.dtype)
            h = waves @ w["linear_1.weight"].T + w["linear_1.bias"]
            extra = (h * h.sigmoid()) @ w["linear_2.weight"].T + w["linear_2.bias"]
            hooks = [self.unet.time_embedding.register_forward_hook(lambda m, i, o: o + extra)]
        out = self.unet(x, torch.tensor([t]), c["prompt_embeds"], added_cond_kwargs=added).sample
        for hook in hooks:
            hook.remove()
        return out

    def jump(self, adapter, x, t, s, c, K=0):
        e = self.eps(adapter, x, t, c, s, K)
        return ALPHA[s + 1] * (x - SIGMA[t + 1] * e) / ALPHA[t + 1] + SIGMA[s + 1] * e

    def loss(self, x_0, cond, rows, noise, w, target, distance):
        """Mean of Eq. 10 over the examples, gradients left in the student's adapter."""
        total = 0.0
        for i, (t1, t0, tau, K, keep_prompt) in enumerate(rows):
            c = {k: v[i : i + 1] for k, v in cond.items()}
            empty = {k: v if k == "time_ids" else 0 * v for k, v in c.items()}
            x1 = ALPHA[t1 + 1] * x_0[i : i + 1] + SIGMA[t1 + 1] * noise[i : i + 1]
            c = c if keep_prompt else empty
            with torch.no_grad():
                x0 = self.jump(None, x1, t1, t0, c)
                if keep_prompt:
                    x0 = (1 + w) * x0 - w * self.jump(None, x1, t1, t0, empty)
                aim = self.jump(target, x0, t0, tau, c, K)
            loss = distance(self.jump("student", x1, t1, tau, c, K) - aim) / len(rows)
            loss.backward()
            total += loss.item()
        return total


def drawn(nets, x_0, seed):
    return nets.sample(x_0.shape, torch.Generator().manual_seed(seed), "cpu")


def example(b=4, dtype=torch.float64, seed=0):
    """x_0 and a condition for the tiny SDXL."""
    cond = {
        "prompt_embeds": randn(b, 77, 128, seed=seed + 1),
        "pooled": randn(b, 48, seed=seed + 2),
    }
    cond = {k: v.to(dtype) for k, v in cond.items()}
    cond["time_ids"] = torch.tensor([[64, 80, 0, 8, 64, 64]]).repeat(b, 1)
    cond["time_ids"][:, 2] = torch.arange(b)
    return randn(b, 4, 8, 8, seed=seed).to(dtype), cond


def busy(unet, rank=4, alpha=2.0, seed=1, scalar="", told_ks=()):
    """A LoRA that already has an effect, and so have its scalar embedding and its vectors of K."""
    start = torch.Generator().manual_seed(seed)
    lora = LoRA.init(unet, rank, alpha, start, scalar)
    if told_ks:
        lora = add_k_adapter(lora, unet, told_ks, rank, alpha, start)
    generator = torch.Generator().manual_seed(seed + 1)
    for adapter in lora.adapters.values():
        adapter.up.data += 0.3 * torch.randn(adapter.up.shape, generator=generator)
    if scalar:
        for p in lora.scalar_embedding.linear_2.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return lora


def tiny_tdd(
    folder,
    dtype=torch.float64,
    rank=4,
    alpha=2.0,
    discriminator=False,
    seed=1,
    scalar="",
    **settings,
):
    """Ours on the tiny SDXL, with a LoRA that already has an effect."""
    unet = load.load_sdxl(folder).unet.to(dtype)
    lora = busy(unet, rank, alpha, seed, scalar, settings.get("told_ks", ()))
    config = TDDConfig(**{"targets": targets_of("tdd", 50), "schedule": SCHEDULE, **settings})
    heads = Discriminator(unet, 250, 0) if discriminator else None
    return TDDStep(unet, lora.to(dtype), config, heads)


def tiny_tdm(folder, **settings):
    """TDM's student and fake score on the tiny SDXL, both with an effect."""
    unet = load.load_sdxl(folder).unet.double()
    Ks = settings.get("told_ks", ())
    lora, fake_lora = (busy(unet, seed=seed, told_ks=Ks).double() for seed in (1, 5))
    return TDMStep(unet, lora, fake_lora, TDMConfig(SCHEDULE, N=50, **settings))


def full_student(folder):
    """A UNet trained as a whole that takes its target time, with a moving average, in float32."""
    unet = load.load_sdxl(folder).unet.requires_grad_(False)
    full = build.copy_unet(unet, "target_time", torch.Generator().manual_seed(0))
    full.checkpoint_blocks()
    config = TDDConfig(targets_of("tcd", 50), SCHEDULE, eta=0.0, mu=0.9, jump=TCF["s"])
    return TDDStep(unet, None, config, None, full)


def same_gradients(lora, theirs, name):
    """Asserts that a LoRA of ours has the gradients of an adapter of theirs, to 1e-5.

    What reads K off the crop is frozen, and has none.
    """
    params, frozen = {}, 0
    for layer, adapter in lora.adapters.items():
        params[layer, "lora_A"] = adapter.down
        params[layer, "lora_B"] = adapter.up
        if isinstance(adapter, KAdapter):
            assert params.pop((layer, "lora_A")).grad is None
            frozen += 1
    if lora.scalar_embedding is not None:
        for k, p in lora.scalar_embedding.named_parameters():
            params["scalar", k] = p
    for key, p in params.items():
        grad = theirs.params[name, *key].grad
        assert grad is not None, key
        assert (p.grad - grad).abs().max() <= 1e-5 * grad.abs().max(), key
    assert len(params) + frozen == sum(key[0] == name for key in theirs.params)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
