"""Pairs from the teacher's path: Eq. 12 and DDIM by hand in numpy, laws of the draws, budgets."""

import math
from fractions import Fraction
from itertools import count, pairwise

import numpy as np
import pytest
import torch

from common.compare import PASSES, path_steps
from common.walkers import BATCHES, Walkers, stagger_goal, stagger_steps
from solvers import SOLVERS, solver_grid
from tcd import TCF
from tdd import sample_step, targets_of, tdd_loss
from tests.helpers import ALPHA, SCHEDULE, SIGMA, Net, randn
from tests.oracles import next_stop


class Net64(Net):
    """In float64, whatever walkers are kept in."""

    def forward(self, x_t, t, cond):
        return super().forward(x_t.double(), t, cond)


SHAPE = (2, 3)
TEACHER, STUDENT, TARGET = Net64(0), Net64(7), Net64(20)
NULL = 0.3 * randn(1, 4, seed=40)  # not zeros: a prompt that is dropped shows
RHO, W_RANGE = 0.4, (1.0, 5.0)


class Recorded(Walkers):
    """Walkers that note every path: where it began, with what, and the n of each step on it."""

    def __post_init__(self):
        super().__post_init__()
        self.paths = [[] for _ in self.n]

    def _begin(self, rows):
        super()._begin(rows)
        for row in rows.tolist():
            path = {"noise": self.x[row].clone(), "keep_prompt": self.keep_prompt[row].item(),
                    "w": self.w[row].item(), "cond": self.conds[row], "n": [], "x": []}  # fmt: skip
            self.paths[row].append(path)

    def advance(self, rows, x_n):
        for i, row in enumerate(rows.tolist()):
            self.paths[row][-1]["n"].append(self.n[row].item())
            self.paths[row][-1]["x"].append(x_n[i].clone())
        super().advance(rows, x_n)


def label(number: int):
    """The condition of that number, (4,)."""
    return randn(4, seed=1000 + number)


def encode(conds):
    return torch.stack([label(number) for number in conds]), NULL


def make_walkers(W, N, rho=RHO, w_range=W_RANGE, seed=0):
    """Walkers at t_N of their first paths to conditions 0, 1, 2, ..; and their generator."""
    numbers, generator = count(), torch.Generator().manual_seed(seed)
    grid = torch.tensor(solver_grid(N))

    def draw_conds(b):
        return [next(numbers) for _ in range(b)]

    return Recorded((W, *SHAPE), grid, rho, w_range, draw_conds, generator), generator


def move(walkers, b, targets, student=STUDENT, teacher=TEACHER, target_net=TARGET, **options):
    """A training step's use of walkers: rows, sample and loss, after which they have moved on."""
    rows = walkers.draw(b)
    cond, null = encode([walkers.conds[row] for row in rows.tolist()])
    sample = walkers.sample(rows, targets, 0.0)
    with torch.no_grad():
        loss = tdd_loss(
            student, target_net, teacher, None, cond, null, sample, walkers.w[rows], SCHEDULE,
            **options,
        )  # fmt: skip
    walkers.advance(rows, loss.x_n)
    return rows, sample, loss


# ---------------------------------------------------------------------------------------- the path


def eps_by_hand(x, t, cond):
    """TEACHER in numpy, (2, 3) and (4,)."""
    h = x.flatten() @ TEACHER.a.detach().numpy() / 3 + cond.numpy() @ TEACHER.b.numpy() + t / 500
    return np.sin(h).reshape(SHAPE)


def path_by_hand(path, N):
    """x_{t_{N-1}}, .., x_{t_0} of the teacher's path."""
    return states_by_hand(path, [*(n * 1000 // N - 1 for n in range(N, 0, -1)), 0])


def states_by_hand(path, timesteps):
    """x at all timesteps but the first, of DDIM from a path's noise, guided by Eq. 12."""
    x, w, states = path["noise"].double().numpy(), path["w"], []
    for t, s in pairwise(timesteps):
        eps = eps_by_hand(x, t, NULL[0])
        if path["keep_prompt"]:
            eps = (1 + w) * eps_by_hand(x, t, label(path["cond"])) - w * eps
        x_0 = (x - SIGMA[t + 1] * eps) / ALPHA[t + 1]
        x = ALPHA[s + 1] * x_0 + SIGMA[s + 1] * eps
        states.append(x)
    return states


@pytest.mark.parametrize("N, W", [(10, 12), (8, 5), (20, 7)])
def test_a_path_is_the_teachers_whatever_the_batches(N, W):
    """Guided DDIM by hand from the noise to t_0, each n once, in batches of 1 to W of any mixture.

    Staggering walks the same path in batches of its own.
    """
    walkers, _ = make_walkers(W, N)
    walkers.stagger(TEACHER, encode, SCHEDULE, batch=3)
    targets = targets_of("tdd", N, Ks=(2, 4))
    for i in range(6 * N):
        move(walkers, 1 + i % W, targets)
    whole, kept = 0, set()
    for row, paths in enumerate(walkers.paths):
        for path in paths:
            assert path["n"] == list(range(N - 1, N - 1 - len(path["n"]), -1))
            for found, expected in zip(path["x"], path_by_hand(path, N)):
                assert np.abs(found.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
            whole += len(path["n"]) == N
            kept |= {path["keep_prompt"]} if path["n"] else set()
        # Where it is now: behind the last step, or at the noise of a new path.
        now = paths[-1]
        expected = now["x"][-1] if now["x"] else now["noise"]
        assert torch.equal(walkers.x[row], expected.float())
        assert walkers.n[row] == N - 1 - len(now["n"])
        assert all(len(path["n"]) == N for path in paths[:-1])
    assert whole >= 2 * W and kept == {True, False}


def test_who_arrives_begins_anew_from_noise_with_a_new_condition():
    walkers, _ = make_walkers(6, 4)
    walkers.stagger(TEACHER, encode, SCHEDULE)
    targets = targets_of("tdd", 4, Ks=(2,))
    for _ in range(500):
        rows, *_ = move(walkers, 5, targets)
        for row in rows.tolist():
            if not walkers.paths[row][-1]["n"]:  # it has begun just now
                assert walkers.n[row] == 3 and walkers.conds[row] == walkers.paths[row][-1]["cond"]
    paths = [path for each in walkers.paths for path in each]
    # Every condition that was listed was begun with once.
    assert sorted(path["cond"] for path in paths) == list(range(len(paths))) and len(paths) > 600
    noise = torch.stack([path["noise"] for path in paths]).flatten()
    assert noise.mean().item() == pytest.approx(0, abs=4 / len(noise) ** 0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / (2 * len(noise)) ** 0.5)
    assert len({tuple(path["noise"].flatten().tolist()) for path in paths}) == len(paths)


def test_a_walker_whose_step_overflows_stays_for_that_step():
    """Of two with NaN or infinity in the teacher's step; it goes on from there a step later."""
    walkers, _ = make_walkers(5, 10, rho=0.0)
    walkers.stagger(TEACHER, encode, SCHEDULE)
    rows, before, n = torch.tensor([3, 0, 2]), walkers.x.clone(), walkers.n.clone()
    x_n = randn(3, *SHAPE, seed=5)
    x_n[0, 1, 2], x_n[2, 0, 0] = torch.nan, -torch.inf
    walkers.advance(rows, x_n)
    assert torch.equal(walkers.x[0], x_n[1].float())
    assert torch.equal(walkers.x[1:], before[1:])
    assert torch.equal(walkers.n, n - torch.tensor([1, 0, 1, 1, 0]))


def test_a_path_by_another_solver_is_the_one_it_trains_with():
    """DPM-Solver++(2S), in staggering as in training: the steps of solve()."""
    walkers, _ = make_walkers(5, 5, rho=0.0, w_range=(0.0, 0.0))
    solver = SOLVERS["dpm++2s"]()
    walkers.stagger(TEACHER, encode, SCHEDULE, solver)
    targets = targets_of("tdd", 5, Ks=(2,))
    for _ in range(12):
        move(walkers, 5, targets, solver=solver)
    for paths in walkers.paths:
        path = paths[0]
        cond, x, states = label(path["cond"])[None], path["noise"][None], []
        for t, s in pairwise([999, 799, 599, 399, 199, 0]):
            x = solver(lambda x, t, cond=cond: TEACHER(x, t, cond), x, t, s, SCHEDULE).float()
            states.append(x[0])
        for found, expected in zip(path["x"], states, strict=True):
            assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- staggered times


@pytest.mark.parametrize("W, N", [(40, 10), (64, 250), (10, 10), (7, 20), (23, 10), (8, 50)])
def test_staggered_walkers_are_spread_evenly(W, N):
    """Each n as often as any other to one walker; with fewer walkers than n, evenly spaced."""
    walkers, _ = make_walkers(W, N)
    walkers.stagger(lambda x, t, c: 0 * x, encode, SCHEDULE, batch=5)
    assert torch.equal(walkers.n, stagger_goal(W, N))
    counts = np.bincount(walkers.n.numpy(), minlength=N)
    assert len(counts) == N and counts.sum() == W
    assert set(counts) <= {W // N, math.ceil(W / N)}
    if W < N:
        gaps = np.diff(np.sort(walkers.n.numpy()))
        assert set(gaps) <= {N // W, math.ceil(N / W)}
    for row, (path,) in enumerate(walkers.paths):  # nobody has begun twice
        assert walkers.n[row] == N - 1 - len(path["n"])


def test_n_stays_uniform_and_walkers_take_turns():
    """Each n and each walker as often as any other, in every quarter of thousands of steps.

    A batch has b/W of the one before, as if there had been none.
    """
    W, N, b, steps = 32, 8, 8, 8000
    walkers, _ = make_walkers(W, N, w_range=(0.0, 0.0))
    walkers.stagger(lambda x, t, c: 0 * x, encode, SCHEDULE)
    of_n, of_walker, again, before = np.zeros((4, N)), np.zeros((4, W)), 0, set()
    for i in range(steps):
        rows = walkers.draw(b)
        assert len(set(rows.tolist())) == b
        np.add.at(of_n[4 * i // steps], walkers.n[rows].numpy(), 1)
        np.add.at(of_walker[4 * i // steps], rows.numpy(), 1)
        again += len(before & set(rows.tolist()))
        before = set(rows.tolist())
        walkers.advance(rows, walkers.x[rows])
    for counts in (of_n, of_walker):
        share = counts * counts.shape[1] / (b * steps / 4)
        assert np.abs(share - 1).max() < 4.5 * (counts.shape[1] / (b * steps / 4)) ** 0.5
    assert again / steps == pytest.approx(b * b / W, rel=0.05)
    lengths = {len(path["n"]) for paths in walkers.paths for path in paths[:-1]}
    assert lengths == {N}


# -------------------------------------------------------------------------------------- the budget


class Counted:
    """A network that counts the examples it is given."""

    def __init__(self, network):
        self.network, self.examples = network, 0

    def __call__(self, x_t, t, cond):
        self.examples += len(x_t)
        return self.network(x_t, t, cond)


@pytest.mark.parametrize(
    "W, N, stride", [(40, 10, 1), (7, 20, 1), (8, 50, 1), (30, 50, 5), (9, 20, 3)]
)
def test_staggering_takes_as_many_passes_as_it_says(W, N, stride):
    """Two for each step with a prompt, one for each without."""
    for rho, passes in ((0.0, 2), (1.0, 1)):
        walkers, _ = make_walkers(W, N, rho)
        teacher = Counted(TEACHER)
        steps = walkers.stagger(teacher, encode, SCHEDULE, batch=4, stride=stride)
        assert steps == stagger_steps(W, N, stride) and teacher.examples == passes * steps
    assert steps == sum(math.ceil((N - 1 - n) / stride) for n in walkers.n.tolist())


def test_walkers_are_spread_in_strides_of_the_teachers_steps():
    """Guided DDIM by hand down a coarse grid, to the n that fine steps come to."""
    W, N, stride = 12, 20, 5
    walkers, _ = make_walkers(W, N)
    walkers.stagger(TEACHER, encode, SCHEDULE, batch=5, stride=stride)
    assert torch.equal(walkers.n, stagger_goal(W, N))
    grid, lengths = solver_grid(N), set()
    for row, (path,) in enumerate(walkers.paths):
        last = walkers.n[row].item() + 1
        stops = [*range(N, last, -stride), last]
        states = states_by_hand(path, [grid[n] for n in stops])
        lengths.add(len(states))
        for found, expected in zip(path["x"], states, strict=True):
            assert np.abs(found.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert lengths == {0, 1, 2, 3, 4}


def test_without_guidance_a_step_is_one_pass():
    """w' = 0 for all, as with data: the condition's alone, staggered and in the loss."""
    walkers, _ = make_walkers(8, 10, 0.0, (0.0, 0.0))
    teacher = Counted(TEACHER)
    steps = walkers.stagger(teacher, encode, SCHEDULE, batch=4)
    assert teacher.examples == steps
    rows = walkers.draw(4)
    assert walkers.guidance(rows) == 0.0 and isinstance(walkers.guidance(rows), float)
    ranged, _ = make_walkers(8, 10, 0.0, (1.0, 5.0))
    ranged._begin(torch.arange(8))
    assert torch.equal(ranged.guidance(rows), ranged.w[rows])


@pytest.mark.parametrize(
    ("steps", "b", "N", "stride"),
    [(60, 4, 10, 1), (45, 2, 20, 2), (100, 1, 8, 1), (60, 4, 50, 5), (3, 4, 50, 1)],
)
def test_both_kinds_of_pairs_have_equal_budgets(steps, b, N, stride):
    """Passes counted in all networks, a backward pass as two: equal to half a training step."""
    targets, totals = targets_of("tdd", N, Ks=(2, 4)), []
    for pairs in ("data", "teacher"):
        teacher, target_net, student = map(Counted, (TEACHER, TARGET, STUDENT))
        generator = torch.Generator().manual_seed(0)
        walkers, _ = make_walkers(BATCHES * b, N, rho=0.0)
        number = steps
        if pairs == "teacher":
            staggering = walkers.stagger(teacher, encode, SCHEDULE, batch=b, stride=stride)
            number = path_steps(steps, b, staggering)
        for _ in range(number):
            if pairs == "teacher":
                move(walkers, b, targets, student, teacher, target_net)
                continue
            sample = sample_step(targets, (b, *SHAPE), 0.0, 0.0, generator)
            cond, null = encode(range(b))
            with torch.no_grad():
                x_0 = torch.zeros(b, *SHAPE)
                tdd_loss(student, target_net, teacher, x_0, cond, null, sample, 3.5, SCHEDULE)
        totals.append(teacher.examples + target_net.examples + 3 * student.examples)
    assert totals[0] == PASSES["1"] * b * steps
    if path_steps(steps, b, staggering) > 1:
        assert abs(totals[1] - totals[0]) <= PASSES["1"] * b / 2
    else:  # less than what staggering alone takes: one step is left to try things out
        assert 2 * staggering >= PASSES["1"] * b * (steps - 1.5)


# ---------------------------------------------------------------------------------------- the laws


def test_paths_draw_their_null_conditions_and_guidance():
    """keep_prompt with 1 - rho, w' uniform in its range, and neither depends on the other."""

    def begun(W, rho, w_range):
        walkers, _ = make_walkers(W, 2, rho, w_range)
        walkers.stagger(lambda x, t, c: 0 * x, encode, SCHEDULE, batch=W)
        return walkers.keep_prompt, walkers.w.double()

    kept, w = begun(6000, 0.2, (2.0, 14.0))
    kept = kept.double()
    assert kept.mean().item() == pytest.approx(0.8, abs=4 * (0.16 / 6000) ** 0.5)
    # The largest distance of the distribution from a uniform one (Kolmogorov).
    ranks = (torch.arange(6000) + 0.5) / 6000
    assert ((w.sort().values - 2) / 12 - ranks).abs().max() < 1.95 / 6000**0.5
    assert abs(torch.corrcoef(torch.stack([kept, w]))[0, 1]) < 4 / 6000**0.5
    for rho in (0.0, 1.0):
        kept, w = begun(500, rho, (3.5, 3.5))
        assert kept.all() == kept.any() == (rho == 0) and (w == 3.5).all()


@pytest.mark.parametrize("Ks", [(4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8), (5,)])
def test_k_is_drawn_anew_at_each_use_and_the_target_is_its_next_stop(Ks):
    """K uniform whatever n and whatever was drawn before; tau by trying every fraction."""
    N, W = 50, 400
    walkers, generator = make_walkers(W, N)
    walkers.n[:] = torch.randint(0, N, (W,), generator=generator)
    targets, rows = targets_of("tdd", N, Ks=Ks), torch.arange(W)
    draws = [walkers.sample(rows, targets, 0.0) for _ in range(20)]
    for draw in draws[:3]:
        for n, tau, K in zip(walkers.n.tolist(), draw.tau.tolist(), draw.K.tolist()):
            stop = next_stop(Fraction(1000 * n, N), K)
            assert tau == (0 if stop == 0 else math.ceil(stop * N / 1000) * 1000 // N - 1)
    for draw in draws:
        assert torch.equal(draw.t_next, targets.grid[walkers.n + 1])
        assert torch.equal(draw.t_n, targets.grid[walkers.n])
        assert torch.equal(draw.x_next, walkers.x) and draw.noise is None
        assert torch.equal(draw.guided_rows, walkers.keep_prompt.nonzero()[:, 0])
    K = torch.stack([draw.K for draw in draws])  # (20, W)
    for part in (K, K[:, walkers.n < N // 2], K[:, walkers.n >= N // 2]):
        counts = torch.bincount(part.flatten(), minlength=9)[list(Ks)].double()
        assert counts.sum() == part.numel()
        spread = (part.numel() / len(Ks)) ** 0.5
        assert (counts - part.numel() / len(Ks)).abs().max() < 4 * spread
    same = (K[1:] == K[:-1]).double().mean().item()
    assert same == pytest.approx(1 / len(Ks), abs=4 * (1 / len(Ks) / K[1:].numel()) ** 0.5)


def test_targets_below_the_stop_are_eq_8s():
    """eta = 0.3 over the whole timesteps from 0.7 tau to tau, both ends included."""
    N, W = 50, 4000
    walkers, _ = make_walkers(W, N)
    walkers.n[:] = 35  # t_n = 699; the next stop of 4 steps is 499
    draw = walkers.sample(torch.arange(W), targets_of("tdd", N, Ks=(4,)), 0.3)
    counts = torch.bincount(draw.tau, minlength=1000)
    assert draw.tau.min() == 350 and draw.tau.max() == 499  # 0.7 * 499 = 349.3
    assert (counts[350:500] - W / 150).abs().max() < 4.5 * (W / 150) ** 0.5


# ---------------------------------------------------------------------------------------- the loss


METHODS = {
    "K drawn": targets_of("tdd", 50, Ks=(4, 8)), "CM": targets_of("cm", 50),
    "PCM-4": targets_of("pcm", 50, 4), "TCD": targets_of("tcd", 50), "TDD": targets_of("tdd", 50),
}  # fmt: skip


@pytest.mark.parametrize("jump", ["1", "2"])
@pytest.mark.parametrize("method", METHODS)
def test_x_next_in_the_place_of_noised_data(method, jump):
    """tdd_loss of x_next, and of the x_0 and noise that give the same."""
    b, targets, generator = 6, METHODS[method], torch.Generator().manual_seed(3)
    sample = sample_step(targets, (b, *SHAPE), 0.0, 0.4, generator)
    x_0 = randn(b, *SHAPE, seed=9)
    cond, null = encode(range(b))
    a, s = (torch.tensor(c[sample.t_next + 1])[:, None, None] for c in (ALPHA, SIGMA))
    x_next = a * x_0 + s * sample.noise
    fields = {**vars(sample), "noise": None, "x_next": x_next}
    w = torch.linspace(1, 5, b)
    found, expected = (
        tdd_loss(STUDENT, TARGET, TEACHER, x, cond, null, each, w, SCHEDULE, jump=TCF[jump])
        for x, each in ((None, type(sample)(**fields)), (x_0, sample))
    )
    gradients = [torch.autograd.grad(each.loss.sum(), STUDENT.a)[0] for each in (found, expected)]
    for mine, theirs in (*zip(found, expected, strict=True), gradients):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert (found.loss > 0).all()
