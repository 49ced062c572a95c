"""SDXL's step against Algorithm 1 over diffusers' UNet and peft; the training loop by itself."""

import copy
import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

import train_sdxl
from common import files
from common.pictures import to_images
from sdxl import load, pipeline
from sdxl.lora import LoRA
from sdxl.pipeline import null_condition
from solvers import CLEAN, SOLVERS, solve
from tcd import TCF
from tdd import StepSample, conditioned, equidistant, pseudo_huber, squared_l2, targets_of, tdd_loss
from tests.helpers import ALPHA, SCHEDULE
from tests.oracles import (
    Theirs,
    drawn,
    example,
    reference_draws,
    same_gradients,
    tiny_tdd,
    tiny_tdm,
    weights,
)
from training import build, checkpoint, distributed, loop, preview
from training.adversarial import noised_times
from training.checkpoint import TrainState, checkpoint_step, checkpoints, resume_point
from training.export import export
from training.log import draw_loss, peak_memory_gib

# ----------------------------------------------------------------- Algorithm 1 over diffusers' UNet
#
# Everything the step does is done here by other means: diffusers' UNet with peft's adapters instead
# of our LoRA layers, targets found by trying every fraction, one example and one pass at a time.


KS = (4, 6, 8)
CASES = [
    # method, tcf, eta, rho, mu, distance, checkpointing; or what --ks makes of tdd
    ("tdd", "1", 0.3, 0.3, 0.0, squared_l2, True), ("tdd", "1", 0.3, 0.0, 0.9, squared_l2, False),
    ("tdd", "1", 0.0, 1.0, 0.0, squared_l2, False), ("cm", "1", 0.0, 0.5, 0.9, squared_l2, True),
    ("pcm", "1", 0.0, 0.5, 0.0, squared_l2, False), ("tcd", "1", 0.0, 0.5, 0.5, squared_l2, True),
    ("tdd", "1", 0.3, 0.3, 0.9, pseudo_huber, True), ("tcd", "s", 0.0, 0.5, 0.9, squared_l2, True),
    ("tdd", "s", 0.3, 0.3, 0.0, squared_l2, False),
    ("told K", "1", 0.0, 0.3, 0.0, squared_l2, True),
    ("told K", "1", 0.0, 0.3, 0.9, squared_l2, False),
    ("told K", "s", 0.3, 0.3, 0.0, squared_l2, True),
    ("K", "1", 0.0, 0.3, 0.0, squared_l2, False),
]  # fmt: skip
DISTANCES = {
    squared_l2: lambda d: (d**2).mean(),
    pseudo_huber: lambda d: ((d**2 + 0.001**2).sqrt() - 0.001).mean(),
}


@pytest.mark.parametrize("method, tcf, eta, rho, mu, distance, checkpointing", CASES)
def test_step_is_algorithm_1(method, tcf, eta, rho, mu, distance, checkpointing, folder):
    """Loss to 1e-6 and every gradient to 1e-5: methods, K, TCF(S+), offsets, drops and EMA.

    Told K, student and target network have the crop (8 K, 0), the teacher has (0, 0).
    """
    scalar = "target_time" if tcf == "s" else ""
    Ks, told_ks = (KS if method.endswith("K") else ()), (KS if method == "told K" else ())
    method = "tdd" if Ks else method
    targets = targets_of(method, 50, Ks=Ks)
    settings = {"targets": targets, "jump": TCF[tcf], "told_ks": told_ks}
    nets = tiny_tdd(folder, **settings, scalar=scalar, eta=eta, rho=rho, mu=mu, distance=distance)
    nets.base.checkpoint_blocks(checkpointing)
    if mu:  # a moving average that has fallen behind the student
        for p in nets.target_net.parameters():
            p.mul_(0.5)
    x_0, cond = example()
    generator = torch.Generator().manual_seed(7)
    rows, noise = reference_draws(method, 50, 4, x_0.shape, eta, rho, generator, Ks)
    loras = {"student": nets.lora} | ({"target": nets.target_net.lora} if mu else {})
    theirs = Theirs(folder, loras, 4, 2.0, torch.float64)
    adapter = "target" if mu else "student"
    expected = theirs.loss(x_0, cond, rows, noise, 3.5, adapter, DISTANCES[distance])
    found = nets.losses(x_0, cond, null_condition(cond), drawn(nets, x_0, 7))
    found["total"].backward()
    assert found["loss"].item() == pytest.approx(expected, rel=1e-6)
    same_gradients(nets.lora, theirs, "student")
    assert all(p.grad is None for p in nets.base.parameters())


def test_told_of_nothing_yet_it_is_the_student_without(folder):
    """TCF(S+) begins as TCF(1): the same bits from a network with a fresh embedding."""
    (x_0, cond), t = example(), torch.tensor([999, 500, 20, 751])
    plain, knowing = tiny_tdd(folder), tiny_tdd(folder, scalar="target_time")
    fresh = LoRA.init(knowing.base, 4, 2.0, torch.Generator().manual_seed(0), "target_time")
    knowing.lora.scalar_embedding.load_state_dict(fresh.scalar_embedding.state_dict())
    for s in (torch.zeros(4), torch.tensor([751, 0, 0, 499])):
        assert torch.equal(knowing.student(x_0, t, cond, s), plain.student(x_0, t, cond))
    busy_one = tiny_tdd(folder, scalar="target_time").student
    assert not torch.allclose(busy_one(x_0, t, cond, s), busy_one(x_0, t, cond, s + 100), rtol=1e-3)


def test_passes_of_a_step(folder):
    """One of the teacher, with the unconditional one for kept prompts only; target; student."""
    nets, (x_0, cond), passes = tiny_tdd(folder, rho=0.5), example(8), []
    nets.base.conv_in.register_forward_hook(lambda m, inputs, out: passes.append(len(inputs[0])))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows, _ = reference_draws("tdd", 50, 8, (8, 1), 0.3, 0.5, generator)
        nets.losses(x_0, cond, null_condition(cond), drawn(nets, x_0, seed))
        assert passes[-3:] == [8 + sum(kept for *_, kept in rows), 8, 8]
    assert len(passes) == 9


def test_guidance_range(folder):
    """w' ~ U[2, 14], an example at a time: the mean of each alone at its own w'."""
    nets = tiny_tdd(folder, w=(2.0, 14.0))
    w = torch.cat(
        [nets.sample((50, 1), torch.Generator().manual_seed(i), "cpu").w for i in range(40)]
    )
    assert 2 <= w.min() < 2.1 and 13.9 < w.max() <= 14
    assert w.mean().item() == pytest.approx(8, abs=0.25)
    x_0, cond = example()
    d, alone = drawn(nets, x_0, 1), []
    for i in range(len(x_0)):
        rows = {k: v[i : i + 1] for k, v in vars(d.step).items() if v is not None}
        rows.pop("guided_rows")
        part = StepSample(**rows, guided_rows=rows["keep_prompt"].nonzero()[:, 0])
        c = {k: v[i : i + 1] for k, v in cond.items()}
        one = nets.losses(
            x_0[i : i + 1], c, null_condition(c), replace(d, step=part, w=float(d.w[i]))
        )
        alone.append(one["loss"].item())
    together = nets.losses(x_0, cond, null_condition(cond), d)["loss"].item()
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-6)


def test_optimizers_are_the_papers(folder):
    """TDM without momentum, a rate for each network; TDD with Adam's own betas, heads without."""

    def found(nets, *words):
        given = ["--model", folder, "--data", folder, *words]
        args = train_sdxl.parser().parse_args(list(map(str, given)))
        train_sdxl.check_method(args)
        optimizers = build.build_optimizers(train_sdxl.build_config(args), nets)
        groups = {k: o.param_groups for k, o in optimizers.items()}
        assert all(len(g) == 1 for g in groups.values())
        return {k: (g["lr"], g["betas"], g["weight_decay"], list(map(id, g["params"])))
                for k, (g,) in groups.items()}  # fmt: skip

    def own(module):
        return [id(p) for p in module.parameters()]

    tdm, adversarial = tiny_tdm(folder), tiny_tdd(folder, discriminator=True)
    words = ["--method", "tdm", "--lr", 2e-6, "--weight-decay", 0.01]
    assert found(tdm, *words) == {
        "adam": (2e-6, (0.0, 0.999), 0.01, own(tdm.student)),
        "adam_fake": (5e-6, (0.0, 0.999), 0.01, own(tdm.fake)),
    }
    assert found(adversarial, "--adv") == {
        "adam": (2e-6, (0.9, 0.999), 0.0, own(adversarial.student)),
        "adam_heads": (1e-5, (0.0, 0.999), 0.0, own(adversarial.discriminator.heads)),
    }


def test_samples_of_k_steps_are_told_the_nearest_k(folder):
    """The network that pictures are drawn with, of TDD's moving average and of TDM's student."""
    (x_t, cond), t = example(2), torch.tensor([999, 499])
    average = tiny_tdd(folder, told_ks=KS, mu=0.9)
    for p in average.target_net.parameters():
        p.mul_(0.5)
    matching = tiny_tdm(folder, Ks=KS, told_ks=KS)
    for nets, network in ((average, average.target_net), (matching, matching.student)):
        for k, K in ((1, 4), (5, 4), (6, 6), (25, 8)):
            eps, _ = nets.sampler(k)
            ids = torch.tensor([[64, 80, 8 * K, 0, 64, 64]]).repeat(2, 1)
            expected = network(x_t, t, {**cond, "time_ids": ids})
            assert torch.equal(eps(x_t, t, cond), expected)
            other = network(x_t, t, {**cond, "time_ids": ids - 8 * (torch.arange(6) == 2)})
            assert not torch.allclose(other, expected, rtol=1e-3)


def test_vectors_of_k_have_a_rate_of_their_own(folder):
    """linear_1's second factor alone, without decay, in the student and in TDM's fake score."""
    words = ["--model", folder, "--data", folder, "--weight-decay", 0.01, "--k-lr", 3e-4]
    for method, nets in (
        ("tdd", tiny_tdd(folder, told_ks=KS)), ("tdm", tiny_tdm(folder, Ks=KS, told_ks=KS))
    ):  # fmt: skip
        listed = [*words, "--ks", *KS, "--method", method]
        args = train_sdxl.parser().parse_args(list(map(str, listed)))
        train_sdxl.check_method(args)
        optimizers = build.build_optimizers(train_sdxl.build_config(args), nets)
        networks = {"adam": (nets.student, 1e-6, 3e-4)}
        if method == "tdm":
            networks["adam_fake"] = nets.fake, 5e-6, 1.5e-3
        assert optimizers.keys() == networks.keys()
        for name, (network, rate, k_rate) in networks.items():
            vectors = network.lora.adapters["add_embedding.linear_1"].up
            others, of_k = optimizers[name].param_groups
            assert (others["lr"], others["weight_decay"]) == (rate, 0.01)
            assert of_k["lr"] == of_k["initial_lr"] == pytest.approx(k_rate)
            assert of_k["weight_decay"] == 0.0
            assert of_k["params"] == [vectors]
            expected = {id(p) for p in network.parameters()} - {id(vectors)}
            assert sorted(map(id, others["params"])) == sorted(expected)


def test_ema_and_what_is_exported(folder):
    """Line 18 by hand; what is written out is the moving average where there is one."""
    nets = tiny_tdd(folder, mu=0.9)
    before = [p.clone() for p in nets.target_net.parameters()]
    with torch.no_grad():
        for p in nets.student.parameters():
            p.add_(1.0)
    nets.after_step()
    for old, new, now in zip(before, nets.student.parameters(), nets.target_net.parameters()):
        assert torch.allclose(now, 0.9 * old + 0.1 * new)
    assert nets.output_network is nets.target_net is not nets.student
    assert tiny_tdd(folder).output_network.lora is not None and not tiny_tdd(folder).config.mu


def test_training_leaves_the_teacher_alone(folder):
    """Bit-identical output and weights of the base before and after; it never has a gradient."""
    nets = tiny_tdd(folder, torch.float32)
    x_0, cond = example(2, torch.float32)
    t = torch.tensor([751, 3])
    before = {k: v.clone() for k, v in nets.base.state_dict().items()}
    plain = load.load_sdxl(folder).unet(x_0, t, cond)
    assert torch.equal(nets.teacher(x_0, t, cond), plain)
    optimizer = torch.optim.AdamW(nets.student.parameters(), 1e-2)
    for i in range(3):
        nets.losses(x_0, cond, null_condition(cond), drawn(nets, x_0, i))["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(nets.teacher(x_0, t, cond), plain)
    assert not torch.equal(nets.student(x_0, t, cond), plain)
    assert all(torch.equal(v, before[k]) for k, v in nets.base.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in nets.base.parameters())


@pytest.mark.slow
def test_compiled_blocks_are_the_same_and_stay_compiled(folder):
    """Loss and gradients of compiled blocks; another number of guided examples compiles nothing."""
    nets, (x_0, cond) = tiny_tdd(folder, torch.float32), example(4, torch.float32)
    nets.base.checkpoint_blocks()

    def step(seed):
        found = nets.losses(x_0, cond, null_condition(cond), drawn(nets, x_0, seed))
        return found["loss"].item(), torch.autograd.grad(found["total"], nets.student.parameters())

    eager = [step(seed) for seed in (0, 1)]
    guided = [len(drawn(nets, x_0, seed).step.guided_rows) for seed in (0, 1)]
    pipeline.compile_blocks(nets.base, backend="aot_eager")
    graphs = []
    for seed, (loss, gradients) in enumerate(eager):
        found = step(seed)
        assert found[0] == pytest.approx(loss, rel=1e-6)
        for a, b in zip(found[1], gradients):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert guided[0] != guided[1] and graphs[0] == graphs[1] > 10


@pytest.mark.slow
def test_it_learns(folder):
    """One batch, fixed draws, the target network held (mu = 1): the loss falls by 100 and more."""
    nets = tiny_tdd(folder, torch.float32, rank=16, alpha=16.0, mu=1.0, w=(1.0, 1.0))
    for adapter in nets.lora.adapters.values():
        adapter.up.data.zero_()
    x_0, cond = example(2, torch.float32)
    d, losses = drawn(nets, x_0, 0), []
    optimizer = torch.optim.Adam(nets.student.parameters(), 3e-3)
    for _ in range(70):
        found = nets.losses(x_0, cond, null_condition(cond), d)
        found["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
        nets.after_step()
        losses.append(found["loss"].item())
    assert losses[-1] < losses[0] / 100


# -------------------------------------------------------------------------------- the discriminator


def test_noised_times():
    """Uniform over the whole timesteps from tau~ to tau~ + 250, at most 999."""
    u = (torch.arange(2510, dtype=torch.float64) + 0.5) / 2510
    times = noised_times(torch.full((2510,), 300), 250, 1000, u)
    assert torch.equal(times, torch.arange(300, 551).repeat_interleave(10))
    times = noised_times(torch.full((200,), 900), 250, 1000, (torch.arange(200) + 0.5) / 200)
    assert torch.equal(times, torch.arange(900, 1000).repeat_interleave(2))


def head_by_hand(head, h):
    """PCM's head: two 1x1 convolutions of the same width, the second beside a short cut."""
    for i, layers in enumerate((head.conv1, head.conv2)):
        conv, norm, _ = layers
        y = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], h)
        y = y + conv.bias[:, None, None]
        y = F.leaky_relu(F.group_norm(y, 32, norm.weight, norm.bias), 0.01)
        h = h + y if i else y
    return torch.einsum("c,bchw->bhw", head.conv_out.weight[0, :, 0, 0], h) + head.conv_out.bias


def told_by_hand(network, K):
    """The network with crop_top = 8 K."""

    def model(x_t, t, cond):
        ids = cond["time_ids"].clone()
        ids[:, 2] = 8 * K
        return network(x_t, t, {**cond, "time_ids": ids})

    return model


@pytest.mark.parametrize("told_ks", [(), KS])
def test_adversarial_losses_are_hinge_on_diffusers_features(told_ks, folder):
    """Values, and each side's gradients, from diffusers' UNet with hooks where its levels end.

    Of a student that is told K too, whose adversary has the crop (0, 0).
    """
    targets = targets_of("tdd", 50, Ks=told_ks)
    settings = {"adv_weight": 0.1, "targets": targets, "told_ks": told_ks}
    nets = tiny_tdd(folder, discriminator=True, **settings)
    nets.base.checkpoint_blocks()
    x_0, cond = example()
    d = drawn(nets, x_0, 3)
    heads = nets.discriminator.heads.double()
    found = nets.losses(x_0, cond, null_condition(cond), d)
    found["total"].backward()
    grads = [p.grad.clone() for p in nets.student.parameters()]
    of_heads = [p.grad.clone() for p in heads.parameters()]
    for p in [*nets.student.parameters(), *heads.parameters()]:
        p.grad = None
    if told_ks:
        cond["time_ids"][:, 2:4] = 0
    student = told_by_hand(nets.student, d.step.K) if told_ks else nets.student
    _, pred, aim, c, _ = tdd_loss(
        student, student, nets.teacher, x_0, cond, null_condition(cond), d.step, d.w, SCHEDULE
    )
    unet, seen = UNet2DConditionModel.from_pretrained(folder / "unet").double(), []
    unet.requires_grad_(False)
    for module in (*unet.down_blocks, unet.mid_block):
        module.register_forward_hook(
            lambda m, i, out: seen.append(out if torch.is_tensor(out) else out[0])
        )

    def logits(x_tau, z):
        t = [min(tau + int(u * (min(tau + 250, 999) - tau + 1)), 999)
             for tau, u in zip(d.step.tau.tolist(), d.adv_u.tolist())]  # fmt: skip
        ratio = torch.tensor([ALPHA[a + 1] / ALPHA[b + 1] for a, b in zip(t, d.step.tau)])
        ratio = ratio[:, None, None, None]
        added = {"text_embeds": c["pooled"], "time_ids": c["time_ids"]}
        seen.clear()
        x_t = ratio * x_tau + (1 - ratio**2).sqrt() * z
        unet(x_t, torch.tensor(t), c["prompt_embeds"], added_cond_kwargs=added)
        return [head_by_hand(head, h) for head, h in zip(heads.heads, seen, strict=True)]

    z_fake, z_real = d.adv_noise.chunk(2)
    fool = sum((1 - each).clamp(min=0).mean() for each in logits(pred, z_fake)) / 4
    (((pred - aim) ** 2).mean() + 0.1 * fool).backward()
    fake, real = logits(pred.detach(), z_fake), logits(aim.clone(), z_real)
    told = sum((1 + each).clamp(min=0).mean() for each in fake) / 4
    told = told + sum((1 - each).clamp(min=0).mean() for each in real) / 4
    for p in heads.parameters():
        p.grad = None
    told.backward()
    assert found["adv_student"].item() == pytest.approx(fool.item(), rel=1e-5)
    assert found["adv_heads"].item() == pytest.approx(told.item(), rel=1e-5)
    for g, p in zip([*grads, *of_heads], [*nets.student.parameters(), *heads.parameters()]):
        assert (g - p.grad).abs().max() <= 1e-4 * p.grad.abs().max()


# ----------------------------------------------------------------------------------------- the loop


class Stub:
    """Stands for a Loader: endless batches whose number is their content."""

    def __init__(self, position=0):
        self.position, self.bad = position, 0

    def __next__(self):
        self.position += 1
        return {"names": [f"{self.position}.png"], "timesteps": torch.tensor([self.position])}


def stub_state(output, resume=False, **settings):
    """The TrainState of a linear model, its losses and the model."""
    settings = {"lr": "0.1", "eta": "0.1", **settings}
    folder, saved = resume_point(output, resume, settings)
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    generator = torch.Generator().manual_seed(0)
    loader = Stub(saved["positions"][0] if folder else 0)
    state = TrainState(output, {"m": model}, {"adam": optimizer}, generator, loader, settings)
    if folder:
        state.restore(folder, saved)

    def losses(batch):
        x = torch.randn((4, 3), generator=generator) + 0.01 * batch["timesteps"][0]
        loss = (model(x) - 1).square().mean()
        return {"total": loss, "loss": loss}

    return state, losses, model


def config(steps=8, **more):
    return loop.TrainConfig(steps, lambda step: 1.0, **more)


def test_bad_steps_are_skipped_whole(tmp_path):
    """A NaN loss, or a NaN gradient of a finite loss, changes nothing; the next step goes on."""
    state, losses, model = stub_state(tmp_path)
    seen = []

    def spoilt(batch):
        seen.append(weights(model))
        parts = losses(batch)
        if state.loader.position == 3:
            parts = {"total": parts["total"] * math.nan, "loss": parts["loss"] * math.nan}
        if state.loader.position == 5:  # the root of 0 has no slope
            parts["total"] = parts["total"] + (0 * model.bias).sum().sqrt()
        return parts

    loop.fit(state, config(), spoilt)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, True, False, True, False, True, True]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert log[2]["loss"] is None and log[4]["grad_norm"] is None and log[4]["loss"] > 0
    assert (tmp_path / "loss.png").exists()


def test_losses_without_a_logarithm_are_left_out_of_the_picture(tmp_path):
    """A discriminator's loss may be below zero; a step that was skipped has none."""
    losses = [3.0, -1.0, 1.0, None, 0.5, 0.0, 0.25]
    log = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    draw_loss(tmp_path / "all.png", log)
    draw_loss(tmp_path / "kept.png", [line for line in log if (line["loss"] or 0) > 0])
    drawn = [(tmp_path / name).read_bytes() for name in ("all.png", "kept.png")]
    assert drawn[0] == drawn[1]
    draw_loss(tmp_path / "none.png", log[1:2])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("with_scaler", [False, True])
def test_ten_bad_steps_in_a_row_end_the_run(tmp_path, with_scaler):
    """No smaller loss scale helps a loss that is infinite itself."""
    state, losses, model = stub_state(tmp_path)
    state.scaler = build.loss_scaler("cpu", with_scaler)

    def spoilt(batch):
        factor = math.inf if state.loader.position > 4 else 1.0
        return {k: v * factor for k, v in losses(batch).items()}

    with pytest.raises(ValueError, match=r"step 14: .*10 times.*timesteps \[14\] of 14.png"):
        loop.fit(state, config(30, save_every=2), spoilt)
    assert [p.name for p in checkpoints(tmp_path)][-1] == "checkpoint-12"
    assert weights(model).isfinite().all()


def test_accumulation_clipping_and_learning_rate(tmp_path):
    """Three batches' mean gradient, scaled to norm 0.01, in plain SGD steps of rising rate."""
    state, losses, model = stub_state(tmp_path)
    state.optimizers["adam"] = torch.optim.SGD(model.parameters(), 1.0)
    state.optimizers["adam"].param_groups[0]["initial_lr"] = 1.0
    reference, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    rising = loop.TrainConfig(3, lambda step: (step + 1) / 3, grad_accum=3, clip_grad=0.01)
    loop.fit(state, rising, losses)
    for step in range(3):
        total = 0.0
        for i in range(3):
            x = torch.randn((4, 3), generator=generator) + 0.01 * (3 * step + i + 1)
            total = total + (reference(x) - 1).square().mean() / 3
        grads = torch.autograd.grad(total, list(reference.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert state.log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        with torch.no_grad():
            for p, g in zip(reference.parameters(), grads):
                p -= (step + 1) / 3 * g * min(1.0, 0.01 / norm)
    assert torch.allclose(weights(model), weights(reference), atol=1e-6)


def test_each_optimizers_gradient_is_clipped_on_its_own(tmp_path):
    """TDM's two networks: the larger gradient of one leaves the other's as it is."""
    state, _, model = stub_state(tmp_path)
    other = torch.nn.Linear(2, 1)
    before, weight = weights(model).clone(), other.weight.detach().clone()
    for name, module in (("adam", model), ("fake", other)):
        state.optimizers[name] = torch.optim.SGD(module.parameters(), 1.0)
        state.optimizers[name].param_groups[0]["initial_lr"] = 1.0
    state.modules["fake"] = other

    def losses(batch):
        total = 300 * sum(p.sum() for p in model.parameters()) + 0.1 * other.weight.sum()
        return {"total": total, "loss": total}

    loop.fit(state, config(1), losses)
    moved = before - weights(model)
    assert torch.allclose(moved, torch.full_like(moved, moved.numel() ** -0.5), rtol=1e-4)
    assert torch.allclose(other.weight, weight - 0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number, tmp_path):
    whole, losses, model = stub_state(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    loop.fit(whole, config(), losses)
    (tmp_path / "cut").mkdir()
    state, losses, _ = stub_state(tmp_path / "cut")
    before = signal.getsignal(number)

    def killed(batch):
        if batch["timesteps"] == 5:
            os.kill(os.getpid(), number)
        return losses(batch)

    with pytest.raises(SystemExit) as stop:
        loop.fit(state, config(), killed)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    state, losses, again = stub_state(tmp_path / "cut", resume=True)
    assert state.step == 5
    loop.fit(state, config(), losses)
    assert torch.equal(weights(again), weights(model))
    logs = [(tmp_path / k / "log.jsonl").read_text().splitlines() for k in ("whole", "cut")]
    whole_losses, cut_losses = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert whole_losses == cut_losses and len(cut_losses) == 8


def test_checkpoints_are_rotated_passed_over_and_refused(tmp_path):
    state, losses, _ = stub_state(tmp_path)
    loop.fit(state, config(save_every=2, keep=3), losses)
    assert list(map(checkpoint_step, checkpoints(tmp_path))) == [4, 6, 8]
    assert [path.name for path in tmp_path.glob(".*")] == [checkpoint.RUN_FILE]
    with pytest.raises(ValueError, match=r"add --resume"):
        stub_state(tmp_path)
    with pytest.raises(
        ValueError, match=r"made with eta 0.1, not 0.2: resume it with the same, or name"
    ):
        stub_state(tmp_path, resume=True, eta="0.2")
    # One that was cut off, one that never got its name, a line that was being written.
    state = tmp_path / "checkpoint-8" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    (tmp_path / ".checkpoint-10.part").mkdir()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    state, losses, _ = stub_state(tmp_path, resume=True)
    assert state.step == 6
    # The one that stays is this run's, not a broken later one.
    loop.fit(state, config(7, keep=1), losses)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-7"]
    log = [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3, 4, 5, 6, 7]
    path = tmp_path / "checkpoint-7" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "positions": [1, 2]}))
    with pytest.raises(ValueError, match="made by 2 processes"):
        stub_state(tmp_path, resume=True)
    # Nothing to go on from, and nothing that was written is lost.
    path.write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = rf"no checkpoint in {tmp_path} is intact \(checkpoint-7\): delete them to begin again"
    with pytest.raises(ValueError, match=message):
        stub_state(tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_killed_runs_left_of_checkpoints_is_deleted(tmp_path):
    """Once the output is this run's; nothing else that is hidden, or of another name."""
    others = [".checkpoint-4.parts", ".checkpoint-x.old", ".mine", "checkpoint-1.part"]
    for name in (".checkpoint-3.part", ".checkpoint-12.old", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_text("half")
    state, *_ = stub_state(tmp_path)
    assert (tmp_path / ".checkpoint-3.part").exists()
    state.claim_output()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*others, checkpoint.RUN_FILE}


@pytest.mark.parametrize("name", ["log.jsonl", "lora.safetensors", "unet"])
def test_another_runs_files_are_not_written_over(name, tmp_path):
    """Its checkpoints are gone; with --resume a run that came to no checkpoint begins again."""
    (tmp_path / name).mkdir() if name == "unet" else (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path / name} is there: .*name another --output"):
        stub_state(tmp_path)
    if name == "log.jsonl":
        assert stub_state(tmp_path, resume=True)[0].step == 0
    else:
        with pytest.raises(ValueError, match="a run has ended, and its checkpoints are gone"):
            stub_state(tmp_path, resume=True)


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for world, device, expected in ((1, "cuda:2", "cuda:2"), (4, "cuda", "cuda:1"),
                                    (4, "cpu", "cpu")):  # fmt: skip
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert distributed.get_dist_info(device) == (3, world, expected)
    for device in ("cuda:0", "cuda:2"):
        message = f"--device {device}: torchrun gives each process its GPU: --device cuda$"
        with pytest.raises(ValueError, match=message):
            distributed.get_dist_info(device)


def test_memory_is_of_the_runs_device(monkeypatch):
    """A GPU by its number; the process's on a CPU, also where there are GPUs, in the OS's unit."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gib = {"cuda:0": 1, "cuda:1": 3}
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda x: gib[str(x)] * 2**30)
    for device in gib:
        assert peak_memory_gib(device) == peak_memory_gib(torch.device(device)) == gib[device]
    usage = SimpleNamespace(ru_maxrss=2**22)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr("training.log.resource", fake)
    for platform, expected in (("linux", 4), ("darwin", 2**-8)):
        monkeypatch.setattr("sys.platform", platform)
        assert peak_memory_gib("cpu") == expected


def test_the_log_has_the_memory_of_the_weights_device(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_memory_gib", lambda device: {"cpu": 2.5}[str(device)])
    state, losses, _ = stub_state(tmp_path)
    loop.fit(state, config(1), losses)
    assert state.log[0]["memory_gib"] == 2.5


@pytest.mark.parametrize("end", ["no batch", "no finite loss", "another run"])
def test_processes_that_all_end_leave_each_other_first(end, tmp_path, monkeypatch):
    """Else DDP's modules are the last to hold the group, whose threads may not end then."""
    closed = []
    monkeypatch.setattr(distributed, "close", closed.append)
    state, losses, _ = stub_state(tmp_path)
    modules = [SimpleNamespace(no_sync=None)]

    def spoilt(batch):
        if end == "another run":
            (tmp_path / checkpoint.RUN_FILE).write_text("another one")
        parts = losses(batch)
        return {k: v * math.nan for k, v in parts.items()} if end == "no finite loss" else parts

    def no_batch(self):
        raise ValueError("the data is broken")

    if end == "no batch":
        monkeypatch.setattr(Stub, "__next__", no_batch)
    messages = {"no batch": "data is broken", "no finite loss": "10 times in a row",
                "another run": "another run .* has begun"}  # fmt: skip
    with pytest.raises(ValueError, match=messages[end]):
        loop.fit(state, config(10, save_every=1), spoilt, ddp_modules=modules)
    assert closed == [modules]


# ------------------------------------------------------------------------- what a run leaves behind


def test_grids_are_sampled_with_the_students_solver(folder):
    """TDM's DPM-Solver++(2M) begins anew for each picture, and is not DDIM."""
    model, solver = load.load_sdxl(folder), SOLVERS["dpm++2m"]
    step = tiny_tdm(folder, make_solver=solver)
    for module in (step.base, step.lora, step.fake_lora):
        module.float()
    grids = preview.PreviewConfig(None, 64, [3], 0.0, seed=5, prompts=["a red fox", "snow"])
    pictures = preview.Pictures(grids, model, step, "cpu")
    found = pictures.column(3, 0.0, *step.sampler(3))
    for i, picture in enumerate(found):
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5 + i))
        eps = conditioned(step.student, {k: v[i : i + 1] for k, v in pictures.cond.items()})
        with torch.no_grad():
            x_0 = solve(eps, x, [*equidistant(3, 250), CLEAN], SCHEDULE, solver())
            (expected,) = to_images(model.vae.decode(x_0))
        assert np.array_equal(picture, expected)
    plain = pictures.column(3, 0.0, step.student)
    assert not np.array_equal(found[0], plain[0])


@pytest.mark.parametrize("method", ["tdd", "tdm"])
def test_headers_say_the_resolution_and_tdms_solver(method, folder, tmp_path):
    step = (tiny_tdm if method == "tdm" else tiny_tdd)(folder)
    distill_config = replace(build.DistillConfig.of_method(method), solver="dpm2s")
    export(distill_config, folder, 64, step, tmp_path, 3, {})
    for name in ("lora.safetensors", "lora_kohya.safetensors"):
        header = files.read_tensors(tmp_path / name)[1]
        assert header["tdd_resolution"] == "64"
        # TDD's solver is the teacher's alone.
        assert header.get("tdd_solver") == ("dpm2s" if method == "tdm" else None)
    assert header["modelspec.resolution"] == "64x64"


def test_tensors_are_for_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_another_models_state_is_refused(tmp_path):
    state, losses, _ = stub_state(tmp_path)
    loop.fit(state, config(1), losses)
    state.modules["m"] = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(ValueError, match="another model's state: m/bias"):
        state.restore(tmp_path / "checkpoint-1", {"step": 1})


@pytest.mark.parametrize("version", [None, 3, 5])
def test_checkpoints_of_another_version_are_refused(version, tmp_path):
    state, losses, _ = stub_state(tmp_path)
    loop.fit(state, config(1), losses)
    path = tmp_path / "checkpoint-1" / "config.json"
    content = json.loads(path.read_text())
    assert content["settings"].pop("checkpoint_version") == 4
    if version is not None:
        content["settings"]["checkpoint_version"] = version
    path.write_text(json.dumps(content))
    message = rf"checkpoint-version {version or 1}, not 4: resume it .* another --output$"
    with pytest.raises(ValueError, match=message):
        stub_state(tmp_path, resume=True)
