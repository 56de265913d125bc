"""Every test of the project: pytest test_all.py; minutes on 2 CPU cores, no GPU, no network.

1. Against the truth: closed forms for Gaussian data, Bayes on a grid, hand-computed bounds. Each
   test names what it decides, such as DDPM Eq. (7) or Score-SDE Alg. 4: search for it.
2. On a pretend GPU, and at the edges: t = 1, t = T, T from 2 to 4000, odd shapes.
3. As a user: main() on tiny settings, interruption, damage, mistakes, every task.
4. The house: plumbing identical, imports, equation numbers, README.
"""

import ast
import builtins
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import d3pm
import ddim
import ddpm
import ncsn
import sde
import sliced_sm
import unet
from unet import ResBlock, UNet, ddpm_plus_plus, double, fir_blur, halve, ncsn_plus_plus

torch.set_num_threads(1)  # tensors are tiny here
ROOT = Path(__file__).parent
SCRIPTS = {
    "ncsn": ncsn, "ddpm": ddpm, "ddim": ddim, "sde": sde, "sliced_sm": sliced_sm, "d3pm": d3pm,
}
TINY = (
    "--steps 4 --batch-size 4 --channels 8 --num-samples 3 --num-test 3 --sample-batch-size 2 "
    "--channel-mult 1 2 --log-every 2 --device cpu"
).split()
FEWER = {  # what one script alone has, and other values
    "ddpm": ["--T", "20", "--mix-at", "10"],
    "ddim": ["--T", "20", "--num-steps", "5"],
    "ncsn": ["--T", "2", "--levels", "4"],
    "sliced_sm": ["--T", "2", "--levels", "4"],
    "sde": "--beta-max 4 --num-steps 6 --corrector-steps 1 --tolerance 0.1 "
           "--classifier-steps 3".split(),
    "d3pm": "--T 20 --layers 1 --width 8 --heads 2 --length 16".split(),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def within(sample, exact, error, sigmas=3.0):
    """Each entry of sample within sigmas standard errors of exact; entries are few, seeds fixed."""
    assert (torch.as_tensor(sample - exact).abs() <= sigmas * torch.as_tensor(error)).all()


# ---- 1. Against the truth: DDPM ------------------------------------------------------------------

MU = torch.tensor([0.3, -0.2], dtype=torch.float64)
SIGMA = torch.tensor([[1.0, 0.3], [0.3, 0.25]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def has_moments(x, mean, cov, sigmas=3.0):
    """x (n, d) has this mean and covariance, as closely as n draws of a Gaussian do."""
    var, n = cov.diagonal(), len(x)
    within(x.mean(0), mean, (var / n).sqrt(), sigmas)
    within(x.T.cov().view_as(cov), cov, ((var.outer(var) + cov**2) / n).sqrt(), sigmas)


def with_seed(seed, function, *arguments, **options):
    torch.manual_seed(seed)
    return function(*arguments, **options)


class Calls(list):
    """A model, or score, that keeps the x and the t of each of its calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, x, *t):
        self.append((x.detach(), *t))
        return self.model(x, *t)

    def times(self):
        return [t[0].item() for _, t in self]


def exact_eps(schedule):
    """E[eps | x_t] for x_0 ~ N(MU, SIGMA), x (B, 2)."""

    def model(x_t, t):
        alpha_bar = schedule.alpha_bar[t[0]]
        precision = torch.linalg.inv(alpha_bar * SIGMA + (1 - alpha_bar) * EYE)
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * MU) @ precision

    return model


def gaussian_eps(c, schedule):
    """For x_0 ~ N(0, c): E[eps | x_t], its mean square, and the variance of x_t."""
    alpha_bar = schedule.alpha_bar
    variance = alpha_bar * c + 1 - alpha_bar
    return (lambda x, t: (1 - alpha_bar[t[0]]).sqrt() / variance[t[0]] * x,
            (1 - alpha_bar) / variance, variance)


def off_by(delta, x_0, schedule):
    """The model eps + delta: where x_0 is known, so is the noise."""

    def model(x_t, t):
        a_bar = schedule.alpha_bar[t].view(-1, *[1] * (x_0.dim() - 1))
        return ((x_t - a_bar.sqrt() * x_0) / (1 - a_bar).sqrt() + delta).to(x_0.dtype)

    return model


def test_schedule_has_the_published_values_and_limits():  # DDPM Eq. (2), (4), (7)
    schedule = ddpm.Schedule()
    published = [0.9999, 0.99810520, 0.89701815, 0.52408537, 0.07858724, 0.00335055, 4.03583e-5]
    found = schedule.alpha_bar[[1, 10, 100, 250, 500, 750, 1000]]
    assert found.tolist() == pytest.approx(published, rel=1e-5)
    assert schedule.beta_tilde[2].item() == pytest.approx(5.4532e-5, rel=1e-4)
    first = [getattr(schedule, k)[0].item() for k in ("beta", "alpha", "alpha_bar", "beta_tilde")]
    assert first == [0, 1, 1, 0] and schedule.beta_tilde[1] == 0
    beta = [1 - 10**-x for x in (0.0698, 0.0702)]  # alpha_bar_1000: 10^-69.8, 10^-70.2
    assert ddpm.Schedule(1000, beta[0], beta[0]).alpha_bar[-1] > 1e-70
    with pytest.raises(ValueError, match="alpha_bar_T is 6e-71: lower T or beta_T"):
        ddpm.Schedule(1000, beta[1], beta[1])


def test_tables_are_in_float64_and_in_float32_only_on_mps():
    for process in (ddpm.Schedule(), ddim.Schedule(), d3pm.CategoricalDiffusion(4, 3),
                    d3pm.CategoricalDiffusion(16, 3, "gaussian")):
        process.to("cpu")
        names = [name for name, x in vars(process).items() if isinstance(x, torch.Tensor)]
        assert {getattr(process, name).dtype for name in names} == {torch.float64}
        tables = {name: Mock() for name in names}
        vars(process).update(tables)
        process.to("mps")
        assert len(names) >= 3 and {"beta", "alpha_bar"} <= {*names}
        for name, table in tables.items():
            table.to.assert_called_once_with("mps", torch.float32)
            assert getattr(process, name) is table.to.return_value


@pytest.mark.parametrize("T", [2, 1000, 4000])
def test_posterior_is_bayes_on_a_grid(T):  # DDPM Eq. (6), (7)
    schedule = ddpm.Schedule(T)
    x_0, x_t = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    for step in {2, (T + 2) // 2, T}:
        mean, var = ddpm.q_posterior(x_0, x_t, torch.tensor([step]), schedule)
        grid = mean[0] + var[0].sqrt() * torch.linspace(-12, 12, 20001).double()  # x_{t-1}
        before, beta = schedule.alpha_bar[step - 1], schedule.beta[step]
        log_p = -((grid - before.sqrt() * x_0[0]) ** 2) / (2 * (1 - before))
        log_p = log_p - (x_t[0] - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
        p = log_p.softmax(0)
        assert (p * grid).sum().item() == pytest.approx(mean.item(), abs=1e-9)
        assert (p * (grid - mean[0]) ** 2).sum().item() == pytest.approx(var.item(), rel=1e-6)
    mean, var = ddpm.q_posterior(x_0, x_t, torch.tensor([1]), schedule)  # this is the data
    torch.testing.assert_close(mean, x_0)
    assert var == 0


def test_q_sample_is_the_chain_of_single_steps():  # DDPM Eq. (2), (4), (15); DDIM Eq. (4)
    schedule, t = ddpm.Schedule(50, 0.01, 0.2), torch.arange(1, 51)
    one, zero, mean, var = torch.ones(50, 1).double(), torch.zeros(50, 1).double(), 1.0, 0.0
    factor = ddpm.q_sample(one, t, zero, schedule)  # q_sample is linear in x_0 and in eps
    std = ddpm.q_sample(zero, t, one, schedule)
    for step, beta in enumerate(schedule.beta[1:].tolist()):  # Eq. (2)
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta
        assert factor[step].item() == pytest.approx(mean)
        assert std[step].item() ** 2 == pytest.approx(var)
    x_0, eps = torch.randn(2, 50, 1).double()
    x_t = ddpm.q_sample(x_0, t, eps, schedule)
    torch.testing.assert_close(x_t, factor * x_0 + std * eps)
    torch.testing.assert_close(ddpm.predict_x_0(x_t, t, eps, schedule), x_0)


@pytest.mark.parametrize(("variance", "T"), [("large", 1000), ("large", 25), ("small", 25)])
def test_sampler_follows_the_linear_recursion(variance, T):
    """DDPM Alg. 2, DDPM Eq. (11): for Gaussian data every step is linear: exact moments."""
    schedule, n = ddpm.Schedule(T, 0.1 / T, 20 / T), 10_000
    model, x_T = exact_eps(schedule), torch.randn(n, 2).double()
    x = ddpm.ddpm_sample(model, x_T, schedule, variance, clip=False)
    mean, cov = torch.zeros(2).double(), EYE
    for step in range(T, 0, -1):  # Eq. (11) with the exact eps, by hand
        a_bar, alpha, beta = (getattr(schedule, k)[step] for k in ("alpha_bar", "alpha", "beta"))
        gain = beta / (1 - a_bar).sqrt() / alpha.sqrt()
        K = torch.linalg.inv(a_bar * SIGMA + (1 - a_bar) * EYE) * (1 - a_bar).sqrt()
        A = EYE / alpha.sqrt() - gain * K
        noise = {"large": beta, "small": schedule.beta_tilde[step]}[variance] if step > 1 else 0.0
        mean, cov = A @ mean + gain * K @ (a_bar.sqrt() * MU), A @ cov @ A.T + noise * EYE
    has_moments(x, mean, cov)
    if T == 1000:  # and this is nearly the data's
        torch.testing.assert_close(cov, SIGMA, rtol=0.03, atol=0.003)


def test_variances_at_both_ends_and_clipping():  # DDPM Eq. (1), (11), (15), Sec. 3.2
    schedule, t = ddpm.Schedule(10), torch.tensor([1, 2, 10])
    for variance, table in (("large", schedule.beta), ("small", schedule.beta_tilde)):
        x = torch.ones(3, 2)
        _, var, _ = ddpm.p_mean_variance(lambda x, t: 0 * x, x, t, schedule, variance)
        exact = torch.stack([schedule.beta_tilde[2], table[2], table[10]])
        torch.testing.assert_close(var[:, 0], exact.float())
    schedule, t, x_t = ddpm.Schedule(), torch.tensor([1000]), torch.full((1, 2), 3.0)
    clipped, _, x_0_hat = ddpm.p_mean_variance(lambda x, t: 0 * x, x_t, t, schedule)
    assert (x_0_hat == 1).all()  # clipped before the mean
    torch.testing.assert_close(clipped, ddpm.q_posterior(x_0_hat, x_t, t, schedule)[0])
    free, _, x_0_hat = ddpm.p_mean_variance(lambda x, t: 0 * x, x_t, t, schedule, clip=False)
    assert (x_0_hat > 100).all()
    torch.testing.assert_close(free, x_t / schedule.alpha[1000].sqrt().float())  # Eq. (11), eps 0


@pytest.mark.parametrize(("variance", "dtype", "error"), [
    ("large", torch.float64, 1e-5), ("small", torch.float64, 1e-5), ("small", torch.float32, 2e-3)])
def test_bound_of_a_model_with_a_known_error(variance, dtype, error):
    """DDPM Eq. (3), (5), (8), (13): with eps_hat = eps + delta every term is known by hand."""
    schedule, delta = ddpm.Schedule(100), 0.1
    levels = torch.randint(0, 256, (6, 1, 4, 6))
    x_0, a_bar, tilde = levels.double() / 127.5 - 1, schedule.alpha_bar, schedule.beta_tilde
    x = x_0.to(dtype)
    bits = ddpm.bits_per_dim(off_by(delta, x, schedule), x, schedule, variance, clip=False)
    bits = {key: value.double() for key, value in bits.items()}
    beta, sigma2 = schedule.beta[2:], (schedule.beta if variance == "large" else tilde)[2:]
    weight = beta**2 / (2 * sigma2 * schedule.alpha[2:] * (1 - a_bar[2:]))  # Eq. (12)
    gaussian = 0.5 * (tilde[2:] / sigma2 - 1 - (tilde[2:] / sigma2).log())
    square = x_0.square().flatten(1).mean(1)
    L_T = 0.5 * ((1 - a_bar[-1]) + a_bar[-1] * square - 1 - (1 - a_bar[-1]).log())
    normal = torch.distributions.Normal(x_0 - (1 / a_bar[1] - 1).sqrt() * delta, tilde[2].sqrt())
    low, high = normal.cdf(x_0 - 1 / 255), normal.cdf(x_0 + 1 / 255)  # Eq. (13)
    low[levels == 0], high[levels == 255] = 0, 1
    exact = {
        "L_T": L_T / math.log(2),
        "L_t": ((weight * delta**2 + gaussian) / math.log(2)).expand(6, 99),
        "L_0": -(high - low).log2().flatten(1).mean(1),
        "mse": ((1 / a_bar[1:] - 1) * delta**2).expand(6, 100),
        "total": bits["L_T"] + bits["L_t"].sum(1) + bits["L_0"],
    }
    torch.testing.assert_close(bits, exact, rtol=error, atol=1e-7 * error)


@pytest.mark.parametrize("std", [1e-4, 0.0074, 0.3, 1000.0])
def test_decoder_is_a_distribution_over_256_levels(std):  # DDPM Eq. (13)
    levels = (torch.arange(256).double() / 127.5 - 1)[:, None]
    mean = torch.tensor([-3.0, -1.0, -0.997, 0.0, 0.0021, 0.5, 1.0, 7.0]).double()
    log_p = ddpm.decoder_log_prob(levels, mean, torch.tensor(std**2).double())
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(8).double(), rtol=0, atol=1e-6)
    log_p = ddpm.decoder_log_prob(torch.tensor([0.5]), torch.tensor([-0.5]), torch.tensor(1e-4))
    assert log_p.item() == pytest.approx(math.log(1e-12))  # its floor


def test_losses_of_simple_models():  # DDPM Eq. (12), (14); DDPM Alg. 1; DDIM Eq. (5)
    schedule = ddpm.Schedule(3, 0.3, 0.6)  # so that every factor of the weight shows
    x_0 = torch.rand(20_000, 1, 2, 1) * 2 - 1
    model = off_by(0.2, x_0, schedule)
    for loss in (ddpm.ddpm_loss, ddim.ddim_loss):
        zero = loss(lambda x_t, t: torch.zeros_like(x_t), x_0, schedule)
        within(zero, 1.0, math.sqrt(2 / x_0.numel()))
        assert loss(model, x_0, schedule).item() == pytest.approx(0.04, rel=1e-3)
    a, a_bar, beta = schedule.alpha[1:], schedule.alpha_bar[1:], schedule.beta[1:]
    weight = beta**2 / (2 * beta * a * (1 - a_bar))  # Eq. (12) with sigma_t^2 = beta_t
    error = 0.04 * weight.std().item() / math.sqrt(len(x_0))
    within(ddpm.vlb_loss(model, x_0, schedule), 0.04 * weight.mean(), error)


def test_interpolation_keeps_its_noise_and_its_ends():  # DDPM Fig. 8
    schedule, model = ddpm.Schedule(100), Calls(lambda x_t, t: torch.zeros_like(x_t))
    x_0, x_0_prime = torch.full((2, 1, 16, 16), 0.5), torch.full((2, 1, 16, 16), -0.5)
    out = ddpm.interpolate(model, x_0, x_0_prime, 40, [0.0, 0.5, 1.0], schedule)
    assert len(out) == 3 and out[0].shape == x_0.shape
    starts = [x_t for x_t, t in model if t[0] == 40]
    torch.testing.assert_close(starts[1], (starts[0] + starts[2]) / 2)  # linear, noise fixed
    a_bar = schedule.alpha_bar[40].float()
    noise = [(start - sign * 0.5 * a_bar.sqrt()) / (1 - a_bar).sqrt()
             for start, sign in ((starts[0], 1), (starts[2], -1))]
    for z in noise:  # each image is itself, with noise of its own
        assert abs(z.mean()) < 0.15 and z.std().item() == pytest.approx(1, abs=0.1)
    assert abs((noise[0] * noise[1]).mean()) < 0.15
    assert not torch.equal(starts[0][0], starts[0][1])


# ---- 1. Against the truth: DDIM ------------------------------------------------------------------


def gaussian_step(t, s, eta, schedule):
    """Eq. (12) with the exact eps for N(MU, SIGMA), by hand: x_s = A x_t + b + sigma z."""
    a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    sigma = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
    K = (1 - a_t).sqrt() * torch.linalg.inv(a_t * SIGMA + (1 - a_t) * EYE)  # eps = K (x - mean)
    of_eps = (1 - a_s - sigma**2).clamp(min=0).sqrt() - (a_s * (1 - a_t) / a_t).sqrt()
    A = (a_s / a_t).sqrt() * EYE + of_eps * K
    return A, -of_eps * K @ (a_t.sqrt() * MU), sigma


@pytest.mark.parametrize(("eta", "S", "analytic"), [
    (0.0, 1000, False), (0.0, 20, False), (0.5, 10, False), (1.0, 10, False), (0.5, 10, True)])
def test_ddim_follows_the_linear_recursion(eta, S, analytic):
    """DDIM Eq. (9), (12), (16); Analytic-DPM: the mean of eta with noise of its own."""
    schedule, tau = ddim.Schedule(), ddim.timesteps(1000, S)
    x_T = torch.randn(20_000 if eta else 100, 2).double()
    gamma = 0.5 * gaussian_eps(0.5, schedule)[1] if analytic else None
    x = ddim.ddim_sample(exact_eps(schedule), x_T, schedule, tau, eta, gamma=gamma)
    mean, cov, product = torch.zeros(2).double(), EYE, EYE
    for t, s in zip(tau[::-1], [*tau[-2::-1], 0], strict=True):
        A, b, sigma = gaussian_step(t, s, eta, schedule)
        if analytic:
            sigma = ddim.analytic_sigmas(tau, gamma, schedule, eta, False)[tau.index(t)]
        mean, cov, product = A @ mean + b, A @ cov @ A.T + sigma**2 * EYE, A @ product
    if eta == 0:
        torch.testing.assert_close(x, x_T @ product.T + mean)
    else:
        has_moments(x, mean, cov)
    if S == 1000:  # nearly the data's
        torch.testing.assert_close(cov, SIGMA, rtol=0.04, atol=0.004)
        torch.testing.assert_close(mean, MU, rtol=0, atol=0.01)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("eta", "hat", "variance"), [(1.0, False, "small"), (0.5, True, "large")])
def test_eta_1_over_all_steps_is_ddpm(eta, hat, variance, clip):
    """DDIM Eq. (16), Table 1: with sigma-hat, whatever eta, it is DDPM with its other variance."""
    schedule, x_T = ddim.Schedule(25, 0.004, 0.8), torch.randn(2, 1, 4, 4).double()
    model = Calls(lambda x_t, t: torch.tanh(x_t) * (0.5 + t.view(-1, 1, 1, 1) / 50))
    tau = ddim.timesteps(25, 25)
    x = with_seed(3, ddim.ddim_sample, model, x_T, schedule, tau, eta, clip, hat)
    expected = with_seed(3, ddpm.ddpm_sample, model, x_T, schedule, variance, clip)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("S", [1, 2, 3, 7, 10, 50, 300, 600, 1000])
def test_timesteps_are_distinct_and_end_at_T(S, spacing):  # DDIM App. D.2
    tau = ddim.timesteps(1000, S, spacing)
    assert len(set(tau)) == len(tau) == S and tau == sorted(tau) and tau[0] >= 1 and tau[-1] == 1000
    model = Calls(lambda x, t: x * 0.1)
    ddim.ddim_encode(model, torch.randn(1, 2), ddim.Schedule(), tau)
    assert model.times() == [1, *tau[:-1]]


def test_encoding_is_a_first_order_solver():
    """DDIM Eq. (13): encoded and decoded with the exact eps; the error halves as S doubles."""
    schedule, errors = ddim.Schedule(), []
    x_0 = MU + torch.randn(200, 2).double() @ torch.linalg.cholesky(SIGMA).T
    for S in (50, 100, 200):
        tau = ddim.timesteps(1000, S)
        x_T = ddim.ddim_encode(exact_eps(schedule), x_0, schedule, tau)
        back = ddim.ddim_sample(exact_eps(schedule), x_T, schedule, tau)
        errors.append((back - x_0).norm().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.75 < slope < 1.5 for slope in slopes), slopes


def test_slerp_and_slerp_orthogonal():  # DDIM App. D.5; Score-SDE Fig. 6
    z_0, z_1 = torch.randn(2, 3, 2, 4, 4).double()
    torch.testing.assert_close(ddim.slerp(z_0, z_1, 0.0), z_0)
    torch.testing.assert_close(ddim.slerp(z_0, z_1, 1.0), z_1)
    z_1 = z_1 * (z_0.flatten(1).norm(dim=1) / z_1.flatten(1).norm(dim=1)).view(3, 1, 1, 1)
    half = ddim.slerp(z_0, z_1, 0.5)
    torch.testing.assert_close(half.flatten(1).norm(dim=1), z_0.flatten(1).norm(dim=1))
    torch.testing.assert_close((half - z_0).norm(), (half - z_1).norm())
    torch.testing.assert_close(ddim.slerp(z_0[:1], z_1[:1], 0.3), ddim.slerp(z_0, z_1, 0.3)[:1])
    torch.testing.assert_close(ddim.slerp(z_0, z_0, 0.3), z_0)
    assert ddim.slerp(z_0, -z_0, 0.3).isfinite().all()
    z, z_prime = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    for fraction, x, y in ((0, 3, 0), (1 / 3, 3 * 0.75**0.5, 1.5), (0.5, 4.5**0.5, 4.5**0.5),
                           (1, 0, 3)):  # along the quarter circle from z to z'
        torch.testing.assert_close(sde.slerp_orthogonal(z, z_prime, fraction),
                                   torch.tensor([[float(x), float(y)]]))


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_sigma_is_that_of_the_true_posterior(eta, c):  # Analytic-DPM Theorem 1
    schedule = ddim.Schedule(12, 1e-3, 0.6)
    _, gamma, v = gaussian_eps(c, schedule)
    for t in range(1, 13):
        for s in range(t):  # q has x_s = of_x_0 x_0 + of_x_t x_t + sigma z: all is jointly normal
            a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
            sigma = ddim.ddim_sigma(t, s, eta, schedule)
            of_x_t = ((1 - a_s - sigma**2) / (1 - a_t)).clamp(min=0).sqrt()
            covariance = (a_s.sqrt() - of_x_t * a_t.sqrt()) * a_t.sqrt() * c + of_x_t * v[t]
            found = ddim.analytic_sigma(t, s, gamma, schedule, eta, clip=c <= 1)
            assert found**2 == pytest.approx((v[s] - covariance**2 / v[t]).item(), abs=1e-9)


def test_analytic_gamma_and_bounds():  # Analytic-DPM Sec. 3, Theorem 2
    schedule, x_0, tau = ddim.Schedule(50, 0.002, 0.4), torch.randn(4000, 1), [5, 25, 50]
    model, exact, _ = gaussian_eps(1.0, schedule)
    gamma = ddim.analytic_gamma(model, x_0, schedule)
    assert gamma.shape == (51,) and gamma.dtype == torch.float64 and gamma[0] == 0
    assert ((gamma / exact - 1)[1:].abs() < 4 * math.sqrt(2 / 4000)).all() and gamma.max() <= 1
    for t, s in ((50, 25), (25, 5), (5, 4)):
        low, high = (ddim.analytic_sigma(t, s, g, schedule) for g in (gamma + 1, 0 * gamma))
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        of_x_0 = a_s.sqrt() - ((1 - a_s) * a_t / (1 - a_t)).sqrt()  # the weight of x_0 in Eq. (7)
        assert low == 0 and high**2 == pytest.approx((of_x_0**2 * min(1, (1 - a_t) / a_t)).item())
    sigmas = ddim.analytic_sigmas(tau, gamma, schedule, 1.0)
    assert sigmas[0] == 0 and sigmas[1] ** 2 == pytest.approx(3.865e-4, rel=1e-3)  # two levels
    assert sigmas[2] == ddim.analytic_sigma(50, 25, gamma, schedule, 1.0)
    assert ddim.analytic_sigmas([50], gamma, schedule) == [0]


# ---- 1. Against the truth: NCSN ------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ncsn", "sm", "ssm", "ssm-vr", "dsm"])
@pytest.mark.parametrize("c", [0.0, 0.25])
def test_loss_of_gaussian_data_level_by_level(objective, c):
    """NCSN Eq. (5), (6); SSM Sec. 2; SSM Alg. 1.
    s = -k x / (c + sigma^2) for x ~ N(0, c): each objective in closed form, and with it that
    denoising score matching is d / 2 above the others, and that the weight is sigma^2."""
    n, d = 4000, 10
    x, denoising = c**0.5 * torch.randn(n, d).double(), objective in ("ncsn", "dsm")
    for sigma in ncsn.geometric_sigmas(3.0, 0.3, 3):
        for k in (0.0, 0.5, 1.0):  # 0: the score of 0, 1: the data's own
            score = Calls(lambda x, s, k=k: -k * x / (c + s[:, None] ** 2))
            if objective == "ncsn":
                loss = ncsn.ncsn_loss(score, x, sigma[None])
            else:
                loss = sliced_sm.noise_conditional_loss(score, x, sigma[None], objective, 2)
            share = (sigma**2 / (c + sigma**2)).item()
            exact = d * share * (0.5 * k**2 - k) + (d / 2 if denoising else 0)
            known = denoising and share * k == 1  # without any error: what is given is the noise
            assert loss.item() == pytest.approx(exact, abs=1e-9 if known else 0.025 * d)


def gaussian_langevin(mean, var, target, alpha, steps):
    """Mean and variance after x + alpha / 2 s + sqrt(alpha) z with s = -x / target."""
    for _ in range(steps):
        keep = 1 - alpha / (2 * target)
        mean, var = keep * mean, keep**2 * var + alpha
    return mean, var


@pytest.mark.parametrize("denoise", [False, True])
def test_chains_follow_the_linear_recursion(denoise):  # NCSN Eq. (4), NCSN Alg. 1
    for T in (1, 7):
        x = ncsn.langevin(lambda x: -x / 0.25, torch.full((20_000, 1), 2.0), 0.1, T)
        mean, var = gaussian_langevin(2.0, 0.0, 0.25, 0.1, T)
        has_moments(x, torch.tensor([mean]), torch.tensor([[var]]))
    sigmas, x_init = ncsn.geometric_sigmas(3.0, 0.5, 4), torch.full((20_000, 1), 2.0)
    score = Calls(lambda x, sigma: -x / (0.25 + sigma[:, None] ** 2))
    x = ncsn.annealed_langevin(score, x_init, sigmas, 0.1, 5, denoise)
    mean, var = 2.0, 0.0
    for sigma in sigmas.tolist():
        step = 0.1 * sigma**2 / 0.5**2
        mean, var = gaussian_langevin(mean, var, 0.25 + sigma**2, step, 5)
    keep = 1 - 0.25 / 0.5 if denoise else 1
    has_moments(x, torch.tensor([keep * mean]), torch.tensor([[keep**2 * var]]))
    due = [*sigmas.repeat_interleave(5).tolist(), *[0.5] * denoise]
    assert score.times() == pytest.approx(due) and (x_init == 2).all()


def test_the_mixture_its_chains_and_its_score():
    """NCSN Fig. 3, NCSN Alg. 1: annealed, modes have their weights (and noise of sigma_L = 1)."""
    x_init, zero = 16 * torch.rand(2000, 2) - 8, torch.zeros(2000)
    plain = ncsn.langevin(lambda x: ncsn.gmm_score(x, zero), x_init, 0.1, 300)
    sigmas = ncsn.geometric_sigmas(8.0, 1.0, 12)
    annealed = ncsn.annealed_langevin(ncsn.gmm_score, x_init, sigmas, 0.15, 300)
    for x, share, var in ((ncsn.gmm_sample(20_000), 0.8, 1), (plain, 0.5, 1), (annealed, 0.8, 2)):
        first = x.sum(1) > 0
        within(first.float().mean(), share, math.sqrt(share * (1 - share) / len(x)))
        for part, centre in ((x[first], 5.0), (x[~first], -5.0)):
            has_moments(part, torch.full((2,), centre), var * torch.eye(2))
    x = (6 * torch.randn(50, 2).double()).requires_grad_()
    sigma = torch.linspace(0, 5, 50).double()  # its score is the gradient of its log density
    modes, var = [(0.2, -5.0), (0.8, 5.0)], 1 + sigma**2
    logs = [math.log(p) - (x - m).square().sum(1) / (2 * var) for p, m in modes]
    (exact,) = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), x)
    torch.testing.assert_close(ncsn.gmm_score(x.detach(), sigma), exact)


def test_inpainting_gives_the_conditional_mean():  # NCSN Alg. 2
    cov = torch.tensor([[1.0, 0.8, 0.5], [0.8, 1.0, 0.6], [0.5, 0.6, 1.0]])
    mask, known, n = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 1.5, -0.5]), 5000
    sigmas, noisy = ncsn.geometric_sigmas(1.0, 0.05, 6), cov + 0.05**2 * torch.eye(3)
    score = Calls(lambda x, sigma: -x @ (cov + sigma[0] ** 2 * torch.eye(3)).inverse())
    out = ncsn.inpaint(score, known.expand(n, 3), mask, torch.rand(n, 3), sigmas, 0.005, 600)
    exact = cov[0, 1:] @ torch.linalg.solve(cov[1:, 1:], known[1:])
    weights = torch.linalg.solve(noisy[1:, 1:], noisy[1:, 0])  # y itself has noise sigma_L
    var = noisy[0, 0] - noisy[0, 1:] @ weights + 0.05**2 * weights.square().sum()
    has_moments(out[:, :1], exact[None], var.view(1, 1))
    has_moments(out[:, 1:], known[1:], 0.05**2 * torch.eye(2))
    x, x_init, mask = torch.randn(4, 5), torch.rand(4, 5), torch.tensor([1.0, 0, 0, 1, 0])
    arguments = (lambda x, sigma: 3 - x, x, mask, x_init, sigmas, 0.001, 2)
    noisy, mean = (with_seed(2, ncsn.inpaint, *arguments, denoise) for denoise in (False, True))
    torch.testing.assert_close(mean, noisy + 0.05**2 * (3 - noisy))  # the mean of the data


def test_levels_and_techniques_give_the_published_numbers():
    """NCSN Sec. 4.1, NCSNv2 Technique 1, 2, 4."""
    sigmas = ncsn.geometric_sigmas(1.0, 0.01, 10)
    assert sigmas.dtype == torch.float64 and sigmas[0] == 1 and sigmas[-1] == 0.01
    torch.testing.assert_close(sigmas[:-1] / sigmas[1:], torch.full((9,), 1.6681005).double())
    assert ncsn.geometric_sigmas(50.0, 0.01, 1).tolist() == [0.01]
    for sigma_1, L, T, a in ((50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6),
                             (348, 2311, 3, 9e-7)):
        sigmas = ncsn.geometric_sigmas(sigma_1, 0.01, L)
        assert ncsn.step_technique4(sigmas, T) == pytest.approx(a, rel=0.02)
    assert ncsn.scales_technique2(50, 0.01, 3 * 32 * 32) == 219
    data = torch.randn(1100, 2, 3)
    pairs = (data.flatten(1)[:, None] - data.flatten(1)).square().sum(-1).sqrt()
    assert ncsn.max_pairwise_distance(data) == pytest.approx(pairs.max().item(), rel=1e-5)


@pytest.mark.parametrize("T", [1, 5, 50])
def test_step_of_technique_4_keeps_the_variance_best(T):
    """NCSNv2 Technique 4: noise of one level, after T steps at the next, has about its variance."""
    sigmas = ncsn.geometric_sigmas(1.0, 0.1, 60)
    sigma_1, sigma_2 = sigmas[:2].tolist()
    best = 2 * ncsn.step_technique4(sigmas, T)

    def miss(eps):  # data at 0: the perturbed data's variance is sigma^2
        step = eps * sigma_2**2 / 0.1**2
        return abs(gaussian_langevin(0.0, sigma_1**2, sigma_2**2, step, T)[1] / sigma_2**2 - 1)

    assert miss(best) < 0.12 and all(miss(best) < miss(best * k) for k in (0.7, 0.97, 1.03, 1.4))


def test_what_the_networks_of_both_papers_are_given_and_return():
    """2019: the level's index, and the score; 2020 (NCSNv2 Technique 3): 0, and sigma times it."""
    sigmas, index = ncsn.geometric_sigmas(1.0, 0.01, 3), torch.tensor([2, 0, 1])
    x, sigma = torch.rand(3, 1), sigmas[index].float()
    net = Calls(lambda x, t: x + 10 * t.view(3, 1))
    first, sequel = (ncsn.noise_conditional_score(net, sigmas, year)(x, sigma)
                     for year in ("2019", "2020"))
    torch.testing.assert_close(first, 2 * x - 1 + 10 * index.view(3, 1))
    torch.testing.assert_close(sequel, (2 * x - 1) / sigma.view(3, 1))


# ---- 1. Against the truth: sliced score matching -------------------------------------------------

PROJECTIONS = ("rademacher", "gaussian", "sphere")


def test_exact_score_matching_and_objectives_without_noise():  # SSM Sec. 2, 3
    x = torch.randn(3, 1, 2, 2).double()
    score = Calls(lambda x: torch.sin(x) * x.flatten(1).sum(1).view(-1, 1, 1, 1))
    loss = sliced_sm.exact_score_matching(score, x)
    for i in range(3):  # the Jacobian of each image alone
        jacobian = torch.autograd.functional.jacobian(score, x[i : i + 1]).view(4, 4)
        expected = jacobian.trace() + 0.5 * score(x[i : i + 1]).square().sum()
        torch.testing.assert_close(loss[i], expected)
    x, diagonal = torch.randn(4, 3), torch.tensor([2.0, 0.5, 1.0])
    score = Calls(lambda x: -diagonal * x)
    loss = sliced_sm.noisy_score_matching(score, x, 0.0)
    exact = 0.5 * (diagonal * x).square().sum(1) - 3.5  # of a diagonal Jacobian Rademacher is exact
    torch.testing.assert_close(loss, exact)
    sliced_sm.noisy_score_matching(score, x, 0.5, "dsm")
    assert torch.equal(score[0][0], x) and not torch.equal(score[1][0], x) and not x.requires_grad


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_sliced_is_exact_in_expectation_and_its_reduced_variance_is_smaller(projection):
    """SSM Sec. 2, 3; SSM Alg. 1.
    s = -B x for x ~ N(0, B^-1), one x; in few dimensions the variance is not always reduced.
    The exact loss is 1/2 |B x|^2 - tr B, its gradient by B is B x x^T - I."""
    n, d = 10_000, 10
    root = torch.eye(d).double() + 0.1 * torch.randn(d, d)
    B, x = root @ root.T, torch.linalg.solve(root.T, torch.randn(d).double())[None]
    exact, slope = 0.5 * (x @ B).square().sum() - B.trace(), (x @ B).T @ x - torch.eye(d)
    B.requires_grad_()
    score = Calls(lambda x: -x @ B.T)

    def sliced(n, scale, *options):  # scale: of what v v^T is multiplied by in the slope
        loss = sliced_sm.sliced_score_matching(score, x.expand(n, d), *options)
        within(loss.mean(), exact, loss.std() / math.sqrt(n))
        (found,) = torch.autograd.grad(loss.mean(), B)
        within(found, slope, math.sqrt(2 / n) * scale, sigmas=4)
        return loss.var().item()

    loss = sliced_sm.exact_score_matching(score, x)
    torch.testing.assert_close((loss[0], torch.autograd.grad(loss, B)[0]), (exact, slope))
    plain = sliced(n, slope.norm(dim=0), 1, projection, False)
    reduced = sliced(n, 1, 1, projection)
    assert reduced < 0.8 * plain
    var = 2 * B.square().sum()  # of v^T B v
    if projection == "rademacher":
        var = var - 2 * B.diagonal().square().sum()
    if projection == "sphere":  # E[v_i^4] = 3 d / (d + 2), E[v_i^2 v_j^2] = d / (d + 2)
        var = d / (d + 2) * (var + B.trace() ** 2) - B.trace() ** 2
    assert reduced == pytest.approx(var.item(), rel=0.1)
    several = sliced(n // 4, 1, 8, projection)  # independent
    assert several == pytest.approx(var.item() / 8, rel=0.15)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (1,)])
def test_projections_have_the_identity_for_covariance(shape):  # SSM Sec. 3
    n, d = 20_000, math.prod(shape)
    for projection in PROJECTIONS:
        v = sliced_sm.random_projection(torch.zeros(n, *shape).double(), projection)
        assert v.shape == (n, *shape) and v.dtype == torch.float64
        v = v.flatten(1)
        has_moments(v, torch.zeros(d), torch.eye(d), sigmas=4)
        if projection == "rademacher":
            assert set(v.unique().tolist()) == {-1, 1}
        if projection == "sphere":
            torch.testing.assert_close(v.norm(dim=1), torch.full((n,), d**0.5).double())


def test_the_checkerboard():  # SSM's toy data
    x = sliced_sm.checkerboard_sample(8000)
    assert x.shape == (8000, 2) and x.min() >= -4 and x.max() <= 4
    column, row = ((x + 4) / 2).floor().long().clamp(max=3).unbind(1)
    counts = (4 * row + column).bincount(minlength=16).view(4, 4)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (counts[~dark] == 0).all() and ((counts[dark] - 1000).abs() < 4 * 30).all()


# ---- 1. Against the truth: D3PM ------------------------------------------------------------------

TRANSITIONS = ("uniform", "absorbing", "gaussian")
DATA = torch.tensor([0.6, 0.1, 0.3]).double()
ENTROPY = -(DATA * DATA.log2()).sum().item()
PAIRS = torch.tensor([[0.30, 0.02, 0.05], [0.03, 0.20, 0.05], [0.05, 0.05, 0.25]]).double()


def categorical_diffusion(transition, K=3, T=4):
    """One that mixes; the Gaussian has a beta of its own, as it must for few states."""
    beta = F.pad(torch.linspace(0.1, 30 / T, T + 1)[1:], (1, 0)).double()
    return d3pm.CategoricalDiffusion(K, T, transition, beta if transition == "gaussian" else None)


def one_step_matrix(diffusion, t):
    """Q_t entry by entry, from the words of App. A.2."""
    K, beta = diffusion.K, diffusion.beta[t].item()

    def jump(n):
        return math.exp(-4 * n**2 / ((K - 1) ** 2 * beta))

    def entry(i, j):
        if diffusion.transition == "uniform":
            return beta / K + (1 - beta) * (i == j)
        if diffusion.transition == "absorbing":
            return beta * (j == diffusion.mask) + (1 - beta) * (i == j)
        return (i != j) * jump(i - j) / sum(jump(n) for n in range(1 - K, K))

    Q = torch.tensor([[entry(i, j) for j in range(K)] for i in range(K)], dtype=torch.float64)
    return Q + (1 - Q.sum(1)).diag() if diffusion.transition == "gaussian" else Q


def has_shares(x, p, error=0.0):
    """The states x of any shape have the probabilities p (K,), as closely as drawn ones do."""
    share = x.flatten().bincount(minlength=len(p)) / x.numel()
    within(share, p, (p * (1 - p) / x.numel()).sqrt() + error)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("K", [2, 5])
def test_matrices_of_every_step_and_what_is_drawn(transition, K):  # D3PM Eq. (2), (3)
    diffusion, product = categorical_diffusion(transition, K, 7), torch.eye(K).double()
    assert torch.equal(diffusion.Q(0), product) and torch.equal(diffusion.Q_bar(0), product)
    every = torch.arange(K)[None]
    for t in range(1, 8):
        Q, steps = one_step_matrix(diffusion, t), torch.tensor([t])
        torch.testing.assert_close(diffusion.Q(t), Q, rtol=1e-12, atol=1e-14)
        product = product @ Q
        torch.testing.assert_close(diffusion.Q_bar(t), product, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(diffusion.q_probs(every, steps)[0], product)
        torch.testing.assert_close(diffusion.likelihood(every, steps, torch.float64)[0], Q.T)
        if t in (1, 4):
            x_t = diffusion.q_sample(every.expand(20_000, K), steps.expand(20_000))
            for state, exact in enumerate(product):
                has_shares(x_t[:, state], exact, 1e-9)


def test_the_gaussian_matrix():
    """D3PM Eq. (2) and the words of App. A.2.3: jumps have the weights of a Gaussian of variance
    beta / 2 on states scaled to [-1, 1], and what would leave the states stays."""
    small, weight = d3pm.gaussian_matrix(2, 0.8), math.exp(-4 / 0.8)  # two states, 2 apart
    leave = weight / (1 + 2 * weight)  # the jumps are -1, 0, 1
    torch.testing.assert_close(
        small, torch.tensor([[1 - leave, leave], [leave, 1 - leave]]).double())
    Q, states = d3pm.gaussian_matrix(201, 0.02), torch.linspace(-1, 1, 201).double()
    assert Q.dtype == torch.float64 and Q.min() >= 0 and torch.equal(Q, Q.T)
    torch.testing.assert_close(Q.sum(1), torch.ones(201).double(), rtol=0, atol=1e-14)
    assert (Q[100] * states**2).sum().item() == pytest.approx(0.02 / 2, rel=1e-6)


def test_published_schedules_and_presets():  # D3PM Eq. (1), (18), App. A.2
    uniform, absorbing, gaussian = (
        d3pm.CategoricalDiffusion(256, 1000, transition) for transition in TRANSITIONS)
    assert uniform.beta[1].item() == pytest.approx(2.06e-5, rel=1e-2) and uniform.beta[-1] == 0.999
    assert uniform.alpha_bar[-1].item() == pytest.approx(1.6e-6, rel=0.03)
    torch.testing.assert_close(absorbing.alpha_bar, 1 - torch.arange(1001).double() / 1000)
    assert absorbing.mask == 128
    entries = ((1, 128, 128), (1, 0, 0), (1, 128, 129), (1000, 128, 128), (1000, 0, 0))
    found = [gaussian.Q(t)[i, j].item() for t, i, j in entries]
    assert found == pytest.approx([0.442502, 0.721251, 0.239199, 0.031290, 0.515645], abs=1e-6)
    middle = [gaussian.Q_bar(t)[128, 128].item() for t in (10, 100, 500, 1000)]
    assert middle == pytest.approx([0.101613, 0.013427, 0.0039222, 0.00390625], rel=1e-4)
    for matrices in (gaussian.matrices, gaussian.products):
        assert (matrices.sum(2) - 1).abs().max() < 1e-12 and matrices.min() >= 0
    presets = [d3pm.CategoricalDiffusion(K, T, transition) for K, T, transition in (
        (5, 256, "absorbing"), (28, 1000, "absorbing"), (5, 256, "uniform"), (27, 1000, "uniform"),
        (16, 100, "gaussian"))]
    for diffusion in (uniform, absorbing, gaussian, *presets):
        q = diffusion.q_probs(torch.arange(diffusion.K)[None], torch.tensor([diffusion.T]))
        L_T = (torch.xlogy(q, q) - torch.xlogy(q, diffusion.prior)).sum(-1).max() / math.log(2)
        assert L_T < (1e-12 if diffusion.transition == "absorbing" else 1e-4)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_is_bayes_by_enumeration(transition, dtype):
    """D3PM Eq. (3) for every x_0, x_t and t; D3PM Eq. (4) and Multinomial Eq. (13) as the sum of
    joint probabilities."""
    K, T = 16, 4
    diffusion, eye = d3pm.CategoricalDiffusion(K, T, transition), torch.eye(K).double()
    before, x_t = eye, torch.arange(K).expand(K, K)  # x_t[x_0] is every state
    prediction = torch.rand(K, K).double().softmax(1)  # p~(x_0 | x_t), rows by x_t
    for t in range(1, T + 1):
        Q, steps = one_step_matrix(diffusion, t), torch.full((K,), t)
        joint = (before[:, :, None] * Q).transpose(1, 2)  # [x_0, x_t, x_{t-1}]
        q = diffusion.posterior(eye[:, None].expand(K, K, K).to(dtype), x_t, steps)
        p = diffusion.posterior(prediction[None].to(dtype), x_t[:1], steps[:1])[0]
        for found, exact in ((q, joint), (p, torch.einsum("ji,ijk->jk", prediction, joint))):
            chance = exact.sum(-1)
            possible = chance > 1e-6  # where it is not, any distribution will do
            exact = (exact / chance[..., None]).to(dtype)
            torch.testing.assert_close(found[possible], exact[possible], rtol=1e-4, atol=1e-7)
            assert found.min() >= 0
            torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
        before = before @ Q


def exact_model(data, diffusion):
    """Logits of the exact model of this parameterisation for data (K,) or (K, K): p(x_0^i | the
    other position of x_t), and at t = 1 p(x_0^i | x_1)."""

    def model(x_t, t):
        here = diffusion.Q_bar(t[0].item()).T[x_t]  # q(x_t^i | x_0^i), (B, D, K)
        own = here if t[0] == 1 else torch.ones_like(here)
        if data.dim() == 1:
            return (data * own).log()
        other = torch.stack([here[:, 1] @ data.T, here[:, 0] @ data], dim=1)
        return (own * other).log()

    return model


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("T", [1, 4, 40])
def test_one_position_is_modelled_exactly(transition, T):
    """D3PM Eq. (1), (4): the exact model's bound is H(x_0) + KL(q(x_T) || p(x_T))."""
    diffusion, states, n = categorical_diffusion(transition, 3, T), torch.arange(3), 20_000
    model, bound = exact_model(DATA, diffusion), torch.zeros(3).double()
    x_0, x_t = states[:, None].expand(3, 3), states.expand(3, 3)  # every pair
    for t in range(1, T + 1):
        steps, q = torch.full((3,), t), diffusion.Q_bar(t)
        term, _ = d3pm.bound_terms(model(x_t, steps).log_softmax(-1), x_0, x_t, steps, diffusion)
        bound += torch.where(q > 0, q * term, 0.0).sum(1) / math.log(2)
    bound += torch.xlogy(q, q / diffusion.prior).nansum(1) / math.log(2)  # L_T
    q_T = DATA @ q
    mismatch = torch.xlogy(q_T, q_T / diffusion.prior).nansum().item() / math.log(2)
    exact = ENTROPY + mismatch
    assert (DATA @ bound).item() == pytest.approx(exact, abs=1e-9)
    x_0 = torch.multinomial(DATA, n, replacement=True)[:, None]
    bits = d3pm.bits_per_dim(model, x_0, diffusion)["total"]
    within(bits.mean(), exact, bits.std() / math.sqrt(n) + 1e-9)
    x = d3pm.d3pm_sample(model, diffusion.prior_sample((n, 1)), diffusion)
    has_shares(x, DATA, math.sqrt(mismatch))


def entropy(p):
    return -torch.xlogy(p, p).sum().item() / math.log(2)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_bound_of_two_positions_stays_above_the_entropy(transition):  # D3PM Eq. (1)
    n, gaps, pairs = 10_000, [], PAIRS.flatten().multinomial(10_000, replacement=True)
    for T in (2, 5, 20):
        diffusion = categorical_diffusion(transition, 3, T)
        model = exact_model(PAIRS, diffusion)
        x_0 = torch.stack([pairs // 3, pairs % 3], dim=1)
        total = 2 * d3pm.bits_per_dim(model, x_0, diffusion)["total"]
        gaps.append((total.mean() - entropy(PAIRS)).item())
        assert gaps[-1] > -3 * total.std() / math.sqrt(n)
    assert gaps[0] > gaps[1] > gaps[2] - 0.01 and gaps[2] < 0.5 * gaps[0]
    x = d3pm.d3pm_sample(model, diffusion.prior_sample((n, 2)), diffusion)
    share = (3 * x[:, 0] + x[:, 1]).bincount(minlength=9) / n
    assert (share - PAIRS.flatten()).abs().sum() < 0.1 + 0.02


@pytest.mark.parametrize(("K", "published"), [(27, 9.509342), (256, 15.999486)])
def test_bound_of_the_uniform_prediction(K, published):
    """D3PM Eq. (1): by symmetry x_t is x_0, or any other state with the weight of all of them."""
    diffusion, t = d3pm.CategoricalDiffusion(K, 1000), torch.arange(1, 1001)
    log_p_0, x_0 = torch.full((1000, 1, K), 1 / K).double().log(), torch.zeros(1000, 1).long()
    bound = 0.0
    for state, states in ((0, 1), (1, K - 1)):
        chance = diffusion.q_probs(x_0, t)[:, 0, state] * states
        terms, _ = d3pm.bound_terms(log_p_0, x_0, torch.full_like(x_0, state), t, diffusion)
        bound += (chance * terms[:, 0]).sum().item() / math.log(2)
    assert bound == pytest.approx(published, abs=2e-5)


def test_infilling_gives_the_conditional():  # D3PM Eq. (4)
    diffusion, known = d3pm.CategoricalDiffusion(4, 30, "absorbing", mask=3), [True, False]
    model = exact_model(F.pad(PAIRS, (0, 1, 0, 1)), diffusion)
    for first in (0, 1, 2):
        x = torch.tensor([first, 0]).repeat(10_000, 1)
        filled = d3pm.infill(model, x, torch.tensor(known), diffusion)
        assert (filled[:, 0] == first).all()
        has_shares(filled[:, 1], PAIRS[first] / PAIRS[first].sum())
    for known, T, begin in ((1, 10, 9), (20, 1000, 500)):  # it begins where so many are masked
        x, model = torch.randint(3, (50, 40)), Calls(lambda x_t, t: torch.zeros(50, 40, 4))
        diffusion = d3pm.CategoricalDiffusion(4, T, "absorbing", mask=3)
        filled = d3pm.infill(model, x, torch.arange(40) < known, diffusion)
        assert model.times() == list(range(begin, 0, -1))
        for state in (filled, *(x_t for x_t, _ in model)):
            assert torch.equal(state[:, :known], x[:, :known])


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_random_terms_are_the_bound_on_average(transition):  # D3PM Eq. (1), (5)
    weight, diffusion = torch.randn(5, 5), categorical_diffusion(transition, 5, 6)
    model = Calls(lambda x_t, t: weight[x_t] * (1 + t.view(-1, 1, 1) / 5))
    x_0 = torch.tensor([[0, 1], [4, 2]]).repeat(500, 1)
    bits = d3pm.bits_per_dim(model, x_0, diffusion)
    torch.testing.assert_close(bits["total"], bits["L_T"] + bits["L_t"].sum(1) + bits["L_0"])
    assert bits["L_t"].shape == (1000, 5)
    losses = [d3pm.d3pm_loss(model, x_0, diffusion, hybrid=0.0) for _ in range(50)]
    losses, terms = torch.stack(losses) * 6 / math.log(2), bits["total"] - bits["L_T"]
    within(losses.mean(), terms.mean(), (losses.var() / 50 + terms.var() / 1000).sqrt())


def test_hybrid_adds_the_cross_entropy_of_the_same_draw_and_l_0_is_the_prediction():
    """D3PM Eq. (5), Multinomial Eq. (14)."""
    diffusion, x_0 = categorical_diffusion("uniform", 4, 5), torch.randint(4, (30, 2, 3))
    weight, copy = torch.randn(4, 4), x_0.clone()
    model = Calls(lambda x_t, t: weight[x_t])
    losses = [with_seed(7, d3pm.d3pm_loss, model, x_0, diffusion, h) for h in (0.0, 0.5)]
    assert torch.equal(model[0][0], model[1][0]) and torch.equal(x_0, copy)
    exact = F.cross_entropy(weight[model[0][0]].flatten(0, 2), x_0.flatten())
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * exact)
    log_p_0, t = torch.randn(30, 2, 3, 4).log_softmax(-1), torch.ones(30).long()
    terms = d3pm.bound_terms(log_p_0, x_0, torch.randint(4, x_0.shape), t, diffusion)
    exact = -log_p_0.gather(-1, x_0[..., None])[..., 0]
    assert torch.equal(terms[0], exact) and torch.equal(terms[1], exact)


@pytest.mark.parametrize("transition", ["uniform", "absorbing"])
def test_skipped_steps_are_the_same_process(transition):  # D3PM Eq. (4), Table 1
    diffusion, tau, n = categorical_diffusion(transition, 3, 20), [3, 4, 11, 20], 20_000
    model = Calls(exact_model(DATA, diffusion))
    stepped, short = d3pm.skip_steps(model, diffusion, tau)
    for i, (s, t) in enumerate(zip([0, *tau], tau, strict=False), 1):
        torch.testing.assert_close(short.Q_bar(i), diffusion.Q_bar(t))
        torch.testing.assert_close(diffusion.Q_bar(s) @ short.Q(i), diffusion.Q_bar(t))
    first = exact_model(DATA, short)  # at its last step it is the posterior of the longer step
    x_0 = torch.multinomial(DATA, n, replacement=True)[:, None]
    bits = d3pm.bits_per_dim(first, x_0, short)["total"]
    within(bits.mean(), ENTROPY, bits.std() / math.sqrt(n) + 1e-6)
    x = d3pm.d3pm_sample(stepped, short.prior_sample((5, 1)), short)
    assert model.times() == tau[::-1] and x.shape == (5, 1)
    beta = torch.tensor([0, 0.1, 1.0, 0.1, 0.5])  # after a step that forgets everything
    _, short = d3pm.skip_steps(None, d3pm.CategoricalDiffusion(3, 4, transition, beta), [2, 3, 4])
    torch.testing.assert_close(short.beta, torch.tensor([0, 1.0, 0.1, 0.5]).double())


@pytest.mark.parametrize("K", [2, 8, 256])
def test_logistic_head_is_a_truncated_logistic(K):  # D3PM App. A.8
    mean = torch.tensor([-1.0, -0.3, 0.0, 0.999]).double()
    log_scale = torch.tensor([-3.0, 0.0, 1.0, 2.5]).double()
    logits = d3pm.discretized_logistic_logits(mean, log_scale, K)
    edges = (torch.arange(K + 1).double() - 0.5) * 2 / (K - 1) - 1
    mass = torch.sigmoid((edges - mean[:, None]) / (log_scale[:, None] - 2).exp()).diff(dim=1)
    exact = mass / mass.sum(1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), exact, rtol=1e-6, atol=1e-12)
    x_t = torch.randint(K, (5, 3))
    logits = d3pm.residual_logits(torch.zeros(5, 3, K), x_t)
    assert torch.equal(logits.argmax(-1), x_t) and logits.sum() == 15


# ---- 1. Against the truth: score-based SDEs ------------------------------------------------------

SDES = {"ve": sde.VE(0.01, 5.0), "vp": sde.VP(), "subvp": sde.SubVP()}
TRIPLES = [
    (name, predictor, corrector)
    for name in SDES for predictor in sde.PREDICTORS for corrector in sde.CORRECTORS
    if not predictor == corrector == "none" and (name, predictor) != ("subvp", "ancestral")
]


def mean_and_std(name, t):
    """Of p(x(t) | x_0), by hand, in float64; x_0's factor and the deviation."""
    t = torch.as_tensor(t).double()
    if name == "ve":
        return torch.ones_like(t), 0.01 * 500**t
    log_mean = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    variance = -torch.expm1(2 * log_mean)
    return log_mean.exp(), variance.sqrt() if name == "vp" else variance


def exact_score(name, mu=MU, sigma=SIGMA):
    """The score at t of x_0 ~ N(mu, sigma), x (B, d)."""
    variances, axes = torch.linalg.eigh(sigma)

    def score(x, t):
        assert t.shape == x.shape[:1] and t.dtype == x.dtype
        m, std = (a[:, None] for a in mean_and_std(name, t))
        return (-((x - m * mu) @ axes / (m**2 * variances + std**2)) @ axes.T).to(x.dtype)

    return score


@pytest.mark.parametrize("name", SDES)
def test_kernels_solve_their_sdes(name):
    """Score-SDE Eq. (5), (9), (11), (12), (29), (30), (31), (32), (33), (34): mean m and variance v
    of x(t) follow dm = a m dt, dv = (2 a v + g^2) dt with f = a x."""
    process, t = SDES[name], torch.linspace(0, 1, 50).double().requires_grad_()
    one = torch.ones(50, 1).double()
    m, std = process.marginal(one + 0 * t[:, None], t)
    torch.testing.assert_close((m[:, 0], std), mean_and_std(name, t))
    assert (m[0], std[0]) == (1, 0.01 if name == "ve" else 0)
    a, g = process.drift_diffusion(one, t)
    m_slope, v_slope = (torch.autograd.grad(y.sum(), t, retain_graph=True)[0][1:]
                        for y in (m, std**2))
    torch.testing.assert_close(m_slope, (a * m)[1:, 0])
    torch.testing.assert_close(v_slope, (2 * a[:, 0] * std**2 + g**2)[1:])


def test_sdes_have_the_published_numbers():  # Score-SDE Eq. (8), (29), (33), (34)
    steps, one = torch.arange(1, 1001), torch.ones(1000)
    m, _ = sde.VP().marginal(one, steps / 1000)  # DDPM is VP, discretised
    assert m[-1].item() ** 2 == pytest.approx(4.3186e-5, rel=1e-4)
    assert (m**2 - ddpm.Schedule().alpha_bar[1:]).abs().max() < 2e-3
    tiny = torch.tensor([1e-5])  # float32, where 1 - exp(...) is off by a percent
    assert sde.SubVP().marginal(one[:1], tiny)[1].item() == pytest.approx(1.00099e-6, rel=1e-4)
    t = torch.tensor([1.0, 1 / 999]).double()  # NCSN's ladder of 1000 levels
    ladder = sde.VE().discretize(torch.ones(2, 1), t, 1 / 999)[1]
    assert ladder.tolist() == pytest.approx([6.50132, 0.00131140], rel=1e-4)
    for name, process in SDES.items():
        z, std = process.prior((2, 3, 4, 5)), 5.0 if name == "ve" else 1.0
        assert process.data_range == ((0.0, 1.0) if name == "ve" else (-1.0, 1.0))
        exact = torch.distributions.Normal(0.0, std).log_prob(z).flatten(1).sum(1)
        torch.testing.assert_close(process.prior_logp(z), exact)
        has_moments(process.prior((20_000, 1)), torch.zeros(1), torch.full((1, 1), std**2))


@pytest.mark.parametrize("name", SDES)
def test_dsm_loss_of_known_scores(name):  # Score-SDE Eq. (7)
    x_0 = MU + torch.randn(20_000, 2).double() @ torch.linalg.cholesky(SIGMA).T
    zero, copy = Calls(lambda x, t: 0 * x), x_0.clone()
    within(sde.dsm_loss(zero, x_0, SDES[name]), 1.0, math.sqrt(2 / x_0.numel()))
    t = zero[0][1]
    assert torch.equal(x_0, copy) and 1e-5 <= t.min() < 1e-3 and 0.999 < t.max() <= 1
    loss = sde.dsm_loss(lambda x, t: exact_score(name)(x, t.double()), x_0, SDES[name])
    m, std = mean_and_std(name, torch.linspace(1e-5, 1, 100_001))
    eigen = torch.linalg.eigvalsh(SIGMA)[:, None]  # 1 - E|std s|^2: z is known but for x_0's part
    exact = (m**2 * eigen / (m**2 * eigen + std**2)).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


def by_hand(name, predictor, t, dt):
    """A predictor's step is of_x x + of_s s + of_z z: these three, like t, with their equations."""
    sigma, before, zero = 0.01 * 500**t, 0.01 * 500 ** (t - dt), 0 * t
    G2, g2 = sigma**2 - before**2, sigma**2 * 2 * math.log(500) * dt
    beta = (0.1 + 19.9 * t) * dt
    keep, low = (1 - beta).sqrt(), beta * (1 - (-0.2 * t - 19.9 * t**2).exp())  # Eq. (12)
    sub = (1 + beta / 2, low, low.sqrt())  # Eq. (6)
    return {
        ("ve", "reverse_diffusion"): (1 + zero, G2, G2.sqrt()),  # Eq. (8), (46)
        ("ve", "ancestral"): (1 + zero, G2, G2.sqrt() * before / sigma),  # Eq. (47)
        ("ve", "euler_maruyama"): (1 + zero, g2, g2.sqrt()),  # Eq. (6), (30)
        ("ve", "probability_flow"): (1 + zero, G2 / 2, zero),  # Eq. (44)
        ("vp", "reverse_diffusion"): (2 - keep, beta, beta.sqrt()),  # Eq. (10), (46)
        ("vp", "ancestral"): (1 / keep, beta / keep, beta.sqrt()),  # Eq. (4)
        ("vp", "euler_maruyama"): (1 + beta / 2, beta, beta.sqrt()),  # Eq. (6), (11)
        ("vp", "probability_flow"): (2 - keep, beta / 2, zero),  # Eq. (43)
        ("subvp", "reverse_diffusion"): sub, ("subvp", "euler_maruyama"): sub,
        ("subvp", "probability_flow"): (1 + beta / 2, low / 2, zero),  # Eq. (43)
    }[name, predictor]


@pytest.mark.parametrize(("name", "predictor"), sorted({
    pair[:2] for pair in TRIPLES if pair[1] != "none"}))
def test_one_step_of_every_predictor(name, predictor):
    """Score-SDE Eq. (4), (6), (8), (10), (12), (43), (44), (46), (47), each row at its own t."""
    x, t = torch.randn(3, 2).double(), torch.tensor([0.2, 0.5, 1.0]).double()
    score = Calls(lambda x, t: torch.sin(3 * x) * t[:, None])  # any
    found = with_seed(5, sde.predict, score, SDES[name], x, t, 0.01, predictor)
    of_x, of_s, of_z = by_hand(name, predictor, t[:, None], 0.01)
    z = with_seed(5, torch.randn_like, x)
    torch.testing.assert_close(found, of_x * x + of_s * score.model(x, t) + of_z * z)
    assert len(score) == 1 and equal(score[0], (x, t))


@pytest.mark.parametrize("name", SDES)
def test_the_posterior_mean_of_gaussian_data(name):
    """Tweedie's formula, Score-SDE App. G: x_0 and x(t) are jointly normal."""
    x, t = torch.randn(4, 2).double(), torch.tensor([1e-5, 0.1, 0.6, 1.0]).double()
    found = sde.posterior_mean(exact_score(name), SDES[name], x, t)
    for row, (m, std) in enumerate(zip(*mean_and_std(name, t), strict=True)):
        gain = m * SIGMA @ torch.linalg.inv(m**2 * SIGMA + std**2 * EYE)
        torch.testing.assert_close(found[row], MU + gain @ (x[row] - m * MU))


@pytest.mark.parametrize(("name", "predictor", "corrector"), TRIPLES)
def test_every_sampler_follows_the_linear_recursion(name, predictor, corrector):
    """Score-SDE Alg. 1, 4, 5: for Gaussian data every step is linear: exact moments at any N."""
    process, N, n, snr = SDES[name], 30, 4000, 0.15
    x = process.prior((n, 2)).double()
    x = sde.pc_sample(exact_score(name), process, x, N, predictor, corrector, snr, 2)
    mean, cov = torch.zeros(2).double(), EYE * (25 if name == "ve" else 1)
    dt, draws = (1 - process.eps) / N, torch.randn(20_000, 2).double()

    def gaussian(t):  # the score at t is -K (x - m mu)
        m, std = mean_and_std(name, t)
        return torch.linalg.inv(m**2 * SIGMA + std**2 * EYE), m * MU, m, std

    for i in range(N, 0, -1):
        t, s = process.eps + i * dt, process.eps + (i - 1) * dt
        if predictor != "none":
            K, centre, _, _ = gaussian(t)
            of_x, of_s, of_z = by_hand(name, predictor, torch.tensor(t).double(), dt)
            A = of_x * EYE - of_s * K
            mean, cov = A @ mean + of_s * K @ centre, A @ cov @ A.T + of_z**2 * EYE
        K, centre, m, std = gaussian(s)
        for _ in range(2 if corrector != "none" else 0):
            g = (draws @ torch.linalg.cholesky(cov).T + mean - centre) @ K
            norms = draws.norm(dim=1).mean() / g.norm(dim=1).mean()
            alpha = 1 if name == "ve" else 1 - (0.1 + 19.9 * s) * dt
            step = 2 * alpha * (snr * (std if corrector == "ald" else norms)) ** 2  # Alg. 4, 5
            A = EYE - step * K
            mean, cov = A @ mean + step * K @ centre, A @ cov @ A.T + 2 * step * EYE
    A = (EYE - std**2 * K) / m  # the denoising step
    has_moments(x, A @ mean + std**2 / m * K @ centre, A @ cov @ A.T, sigmas=4)


@pytest.mark.parametrize("name", SDES)
def test_likelihood_is_the_exact_one(name):  # Score-SDE Eq. (39), (40)
    process, eye = SDES[name], torch.eye(4).double()
    noise, spread = (0.01, 0.1) if name == "ve" else (0.0, 1.0)  # VE's density has noise sigma_min
    sigma, zero = spread**2 * (eye + 0.5) / 1.5, torch.zeros(4).double()
    x, score = torch.randn(3, 4).double() * spread, exact_score(name, zero, sigma)
    exact = torch.distributions.MultivariateNormal(zero, sigma + noise**2 * eye).log_prob(x)
    logp = sde.log_likelihood(score, process, x, 1e-7, 1e-7, "exact")
    torch.testing.assert_close(logp, exact, rtol=0, atol=1e-3)
    for probe in ("rademacher", "gaussian"):
        estimate = sde.log_likelihood(score, process, x[:1].expand(2000, 4), 1e-4, 1e-4, probe)
        assert estimate.std() > 0.1  # of one probe each
        within(estimate.mean(), exact[0], estimate.std() / math.sqrt(2000))


@pytest.mark.parametrize("name", SDES)
def test_ode_keeps_the_marginals_and_is_inverted(name):
    """Score-SDE Eq. (13): of Gaussian data, it scales x - m mu along the axes of sigma."""
    process, x_T = SDES[name], SDES[name].prior((30, 2)).double()
    (m, std), (m_T, std_T) = mean_and_std(name, process.eps), mean_and_std(name, 1.0)
    variances, axes = torch.linalg.eigh(SIGMA)
    scale = ((m**2 * variances + std**2) / (m_T**2 * variances + std_T**2)).sqrt()
    exact = m * MU + (x_T - m_T * MU) @ axes @ torch.diag(scale) @ axes.T  # and not denoised
    score = Calls(exact_score(name))
    x, evaluations = sde.ode_sample(score, process, x_T, 1e-6, 1e-6)
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-4)
    assert evaluations == len(score) > 30
    latent, more = sde.ode_encode(score, process, x, 1e-6, 1e-6)
    torch.testing.assert_close(latent, x_T, rtol=2e-3, atol=2e-3)
    assert evaluations + more == len(score) and more > 30


def test_the_solver_is_of_order_5_row_by_row_and_gives_up():
    """At this tolerance it takes three steps, in fixed parts of the interval: in half the interval
    the error is at most 1 / 2^6. A wrong coefficient would leave a lower order."""
    y_0, errors = torch.tensor([[0.5], [1.0], [-1.0]]).double(), []
    for h in (0.1, 0.05, 0.025):
        y, count = sde.dormand_prince(lambda y, t: 2 * t[:, None] * y**2, y_0, 1.0, 1 + h, 1.0, 1.0)
        assert count == 1 + 3 * 6
        errors.append((y - 1 / (1 / y_0 + 1 - (1 + h) ** 2)).norm().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > 5.9, orders
    speeds, y_0 = torch.tensor([[1.0], [40.0], [5.0]]).double(), torch.ones(3, 2).double()
    slope = Calls(lambda y, t: y * (speeds[: len(y)] * t[:, None]).cos() * speeds[: len(y)])
    both, count = sde.dormand_prince(slope, y_0, 0.0, 2.0, 1e-6, 1e-6)
    alone, fewer = sde.dormand_prince(slope, y_0[:1], 0.0, 2.0, 1e-6, 1e-6)
    assert torch.equal(both[:1], alone) and fewer < count / 3  # rows do not see each other
    torch.testing.assert_close(both, (speeds * 2).sin().exp().expand(3, 2), rtol=0, atol=1e-4)
    for hopeless in (lambda y, t: -1e7 * (y - t.cos()[:, None]), lambda y, t: y * math.nan,
                     lambda y, t: torch.where(t[:, None] > 0.5, math.inf, 1.0) * y,
                     lambda y, t: y**2):  # stiff; the last is infinite at t = 0.5
        with pytest.raises(ValueError, match="gave up at t = .* too stiff"):
            sde.dormand_prince(hopeless, 2 * y_0, 0.0, 1.0, 1e-5, 1e-5, 300)


@pytest.mark.parametrize("process", [
    sde.VE(0.01, 500.0), sde.VP(0.1, 40.0), sde.SubVP(0.1, 40.0)])
def test_bits_per_dim_do_not_depend_on_the_range(process):
    """Score-SDE Eq. (39): one density of levels, N(110, 40^2 I), scaled to [0, 1] or [-1, 1]."""
    images = torch.randint(60, 160, (4, 1, 2, 2), dtype=torch.uint8)
    low, high = process.data_range
    scale = 256 / (high - low)

    def score(x, t):
        m, std = process.marginal(torch.ones_like(x), t)
        mean = m * (110 / scale + low)
        return -(x - mean) / ((m * 40 / scale) ** 2 + std.view(-1, 1, 1, 1) ** 2)

    found = with_seed(7, sde.bits_per_dim, score, process, images, 1e-6, 1e-6)
    levels = images + with_seed(7, torch.rand, images.shape)
    noise = 2.56 if high - low == 1 else 0.0  # sigma_min in levels
    normal = torch.distributions.Normal(110.0, math.hypot(40.0, noise))
    exact = -normal.log_prob(levels).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=2e-3)


def test_guidance_gives_the_exact_conditional():
    """Score-SDE Eq. (49): two equally likely classes, N(+-c, I / 4): the score of one."""
    n, c = 100, torch.tensor([0.5, -0.3]).double()
    labels, x, t = torch.arange(n) % 2, torch.randn(n, 2).double(), torch.rand(n).double()

    def log_joint(x, t):
        m, std = (a[:, None] for a in mean_and_std("vp", t))
        v = m**2 / 4 + std**2
        return torch.stack([-((x - sign * m * c) ** 2 / (2 * v)).sum(1) for sign in (1, -1)], dim=1)

    score = Calls(lambda x, t: torch.func.grad(lambda x: log_joint(x, t).logsumexp(1).sum())(x))
    log_prob = Calls(lambda x, t: log_joint(x, t).log_softmax(1)[torch.arange(n), labels])
    m, std = (a[:, None] for a in mean_and_std("vp", t))
    exact = -(x - m * (1 - 2 * labels[:, None]) * c) / (m**2 / 4 + std**2)
    with torch.no_grad():  # as in every sampler
        once, twice = (sde.guided_score(score, log_prob, scale)(x, t) for scale in (1.0, 2.0))
    torch.testing.assert_close((once, twice), (exact, 2 * exact - score(x, t)))


def test_classifiers_that_are_known():  # Score-SDE App. I.1
    x_0, labels = torch.randn(500, 1, 2, 2), torch.randint(0, 7, (500,))
    loss = sde.classifier_loss(lambda x, t: torch.zeros(len(x), 7), x_0, labels, SDES["vp"])
    assert loss.item() == pytest.approx(math.log(7))
    right = Calls(lambda x, t: 50.0 * F.one_hot(labels, 7))
    assert sde.classifier_loss(right, x_0, labels, SDES["ve"]).item() == pytest.approx(0, abs=1e-6)
    (x, t), = right
    noise = ((x - x_0) / mean_and_std("ve", t)[1].float().view(-1, 1, 1, 1)).std()
    assert noise.item() == pytest.approx(1, abs=0.07) and t.min() < 0.02 and t.max() > 0.98
    assert abs(t.mean() - 0.5) < 0.04 and t.var().item() == pytest.approx(1 / 12, rel=0.1)
    for name in SDES:  # what the network is given, and what becomes of its logits
        x, t, labels = torch.rand(4, 1, 2, 2), torch.rand(4), torch.tensor([2, 0, 1, 1])
        net = Calls(lambda x, t: torch.arange(12.0).view(4, 3))
        log_p = sde.class_log_prob(sde.classifier_model(net, SDES[name]), labels)(x, t)
        torch.testing.assert_close(log_p, torch.arange(3.0).log_softmax(0)[labels])
        torch.testing.assert_close(net[0], (2 * x - 1 if name == "ve" else x, 999 * t))


@pytest.mark.parametrize(("name", "snr"), [("ve", 0.16), ("vp", 0.3)])
def test_inpainting_with_a_corrector_gives_the_conditional_mean(name, snr):
    """Score-SDE App. I.2: at every call the known pixels, here 1.5, have new noise of its t."""
    sigma, noise = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double(), []
    exact, mask = exact_score(name, torch.zeros(2), sigma), torch.tensor([0.0, 1.0])
    known = torch.tensor([[7.0, 1.5]]).double().expand(3000, 2)  # nothing sees the 7

    def score(x, t):
        m, std = mean_and_std(name, t[0])
        noise.append((x[:, 1] - m * 1.5) / std)
        assert abs(noise[-1].mean()) < 0.1 and noise[-1].std().item() == pytest.approx(1, rel=0.07)
        return exact(x, t)

    for corrector, mean, error in (("none", 0.74, 0.03), ("langevin", 1.2, 0.024)):
        x = sde.inpaint(score, SDES[name], known, mask, SDES[name].prior(known.shape).double(),
                        N=600, corrector=corrector, snr=snr)
        assert torch.equal(x[:, 1], known[:, 1])
        assert x[:, 0].mean().item() == pytest.approx(mean, abs=error)  # 0.74: it is biased without
    assert x[:, 0].var().item() == pytest.approx(0.36, rel=0.12)
    assert max(abs((a * b).mean()) for a, b in pairwise(noise)) < 0.1


@pytest.mark.parametrize(("name", "snr"), [("ve", 0.16), ("vp", 0.3)])
def test_colorization_keeps_the_grey_image_and_gives_the_conditional_mean(name, snr):
    """Score-SDE App. I.3: channels of variances 1, 1/4, 1/4: E[x | grey] is 2 variance grey."""
    gray, v = torch.full((3000, 1, 1, 1), 0.5).double(), torch.tensor([1.0, 0.25, 0.25]).double()

    def score(x, t):
        m, std = (a.view(-1, 1, 1, 1) for a in mean_and_std(name, t))
        noise = (x.mean(1, keepdim=True) - m * gray) / std  # of a mean of three channels
        assert noise.std().item() == pytest.approx(3**-0.5, rel=0.07)
        return -x / (m**2 * v.view(3, 1, 1) + std**2)

    x_T = SDES[name].prior((3000, 3, 1, 1)).double()
    x = sde.colorize(score, SDES[name], gray, x_T, N=400, snr=snr)
    torch.testing.assert_close(x.mean(1, keepdim=True), gray)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(v.tolist(), abs=0.04)
    cov = torch.diag(v) - v.outer(v) / v.sum()
    torch.testing.assert_close(x.flatten(1).T.cov(), cov, rtol=0, atol=0.03)


# ---- 2. On a pretend GPU -------------------------------------------------------------------------

META = torch.device("meta")
ATEN = torch.ops.aten


class Gpu(torch.Tensor):
    """A tensor that says it is on cuda:0. Autograd sees a meta tensor, which needs no driver; the
    numbers are in `inner`, on the CPU, where PretendGpu computes with them."""

    device = property(lambda self: torch.device("cuda", 0))
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": META, "storage_offset": inner.storage_offset()}
        tensor = cls._make_wrapper_subclass(cls, inner.shape, inner.stride(), **options)
        tensor.inner = inner
        return tensor

    def __reduce_ex__(self, protocol):  # torch.save writes the numbers
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return PretendGpu.on.__torch_dispatch__(op, types, args, kwargs)


class PretendGpu(TorchDispatchMode):
    """Runs the operations of Gpu tensors on the CPU. Refuses what CUDA refuses: operands on two
    devices, a generator of the CPU. Counts what makes a program wait for a GPU."""

    on = None

    def __init__(self):
        super().__init__()
        PretendGpu.on, self.waits, self.copies = self, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        leaves = []

        def inner(x):  # the arguments with the numbers of each Gpu tensor in its place
            if isinstance(x, (list, tuple)):
                return [inner(y) for y in x]
            leaves.append(x)
            if isinstance(x, torch.device) and x == META:
                return torch.device("cpu")
            return x.inner if isinstance(x, Gpu) else x

        inner_args = [inner(x) for x in args]
        inner_kwargs = {key: inner(x) for key, x in (kwargs or {}).items()}
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, Gpu) for x in tensors)
        on_cpu = any(not isinstance(x, Gpu) and x.dim() > 0 for x in tensors)
        wanted = next((x for x in leaves if isinstance(x, torch.device)), None)
        to_gpu = wanted == META or (on_gpu and (wanted is None or wanted.type != "cpu"))
        moves = op in (ATEN._to_copy.default, ATEN.copy_.default)
        looks_up = op is ATEN.index.Tensor and isinstance(args[0], Gpu)  # CUDA moves the indices
        if on_gpu and on_cpu and not moves and not looks_up:
            raise RuntimeError(f"{op}: tensors on cuda:0 and on the CPU")
        if to_gpu and any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError(f"{op}: a generator of the CPU for a tensor on cuda:0")
        self.copies += (to_gpu and on_cpu) or (moves and on_gpu and not to_gpu)
        mask = looks_up and any(i is not None and i.dtype == torch.bool for i in args[1])
        reads = op in (ATEN._local_scalar_dense.default, ATEN.nonzero.default)
        self.waits += mask or (reads and on_gpu)

        with _disable_current_modes():
            out = op(*inner_args, **inner_kwargs)
        returns = op._schema.returns
        if returns and returns[0].alias_info and returns[0].alias_info.is_write:  # in place
            return next(x for x in tensors if x is out or getattr(x, "inner", None) is out)
        if not to_gpu:
            return out
        if isinstance(out, (list, tuple)):
            return type(out)(Gpu(x) if isinstance(x, torch.Tensor) else x for x in out)
        return Gpu(out) if isinstance(out, torch.Tensor) else out


class CudaIsMeta(TorchFunctionMode):
    """device="cuda" as an argument becomes meta, by which PretendGpu knows its own tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], Gpu):
            PretendGpu.on.waits += 1
            return args[0].inner.tolist()
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))  # torch would make it a meta tensor, unseen
        cuda = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if function is torch.tensor and any(x.type == "cuda" for x in cuda):
            return function(*args, **kwargs | {"device": "cpu"}).to(META)

        def renamed(x):
            return META if isinstance(x, torch.device) and x.type == "cuda" else x

        kwargs = {key: renamed(value) for key, value in kwargs.items()}
        return function(*map(renamed, args), **kwargs)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(module, words) runs main(words) on a pretend GPU; what it counted: of the training, and
    in all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None)  # after its check
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)  # of the CPU too
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)

    def main(module, words):
        training, fit = {}, module.fit

        def counted(*args, **options):
            waits, copies = PretendGpu.on.waits, PretendGpu.on.copies
            fit(*args, **options)
            training.update(waits=PretendGpu.on.waits - waits,
                            copies=PretendGpu.on.copies - copies)

        with CudaIsMeta(), PretendGpu() as mode, monkeypatch.context() as patch:
            patch.setattr(module, "fit", counted)
            module.main([*words.split(), "--device", "cuda"])
        return training, {"waits": mode.waits, "copies": mode.copies}

    return main


GPU_TINY = (
    "--batch-size 4 --channels 4 --channel-mult 1 --num-res-blocks 1 --image-size 4 "
    "--attention-resolutions 4 --num-samples 2 --num-test 2 --log-every 100 --save-every 3"
)
GPU_OWN = {  # flags that make each script's run tiny
    "ddpm": "--T 4 --beta-T 0.5 --mix-at 2",
    "ddim": "--T 4 --beta-T 0.5 --num-steps 2",
    "ncsn": "--levels 3 --T 1",
    "sliced_sm": "--levels 3 --T 1",
    "sde": "--num-steps 3 --beta-max 2 --corrector-steps 1 --tolerance 1 --classifier-steps 2",
    "d3pm": "--T 4 --layers 1 --width 8 --heads 2 --length 8",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gpu_trains_resumes_and_samples_as_the_cpu_does(gpu, folder, name):
    module, words = SCRIPTS[name], f"{GPU_TINY} {GPU_OWN[name]}"
    module.main(f"{words} --steps 3 --out cpu --device cpu".split())
    gpu(module, f"{words} --steps 2 --out gpu")
    gpu(module, "--resume --steps 3 --out gpu")
    states = [[state["model"], state["ema"], state["optimizer"]["state"]]
              for state in map(load_state, ("gpu", "cpu"))]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)
    for picture in ("samples.png", "process.png"):
        ours, theirs = (np.array(Image.open(f"{run}/{picture}")).astype(int)
                        for run in ("gpu", "cpu"))
        assert (abs(ours - theirs) > 2).mean() < 0.01


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_step_waits_for_the_gpu(gpu, folder, name):
    """Neither a training step nor a sampling step waits or copies: longer runs count the same."""
    module = SCRIPTS[name]
    more = {"ddpm": "--T 9", "ddim": "--num-steps 4", "sde": "--num-steps 6", "d3pm": "--T 9"}
    few = f"{GPU_TINY} {GPU_OWN[name]} --save-every 100"
    many = f"{few} {more.get(name, '--T 3')} --num-samples 2"
    shorter, short = gpu(module, f"{few} --steps 3 --out short")
    longer, long = gpu(module, f"{few} --steps 7 --out long")
    assert shorter == longer and shorter["waits"] < 10
    gpu(module, f"{many} --steps 1 --out other")
    counts = [gpu(module, f"--checkpoint {run}/checkpoint.pt --out {run}-samples {words}")[1]
              for run, words in (("short", few), ("other", many))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "words", "tasks"), [
    ("ddpm", "", "sample bpd interpolate"),
    ("ddpm", "--objective vlb --variance small --no-clip --bf16", "bpd"),
    ("ddim", "", "sample sweep reconstruct interpolate"),
    ("ddim", "--eta 0.5 --spacing quadratic", "sample"),
    ("ddim", "--variance analytic --eta 1", "sample"), ("ddim", "--sigma-hat --clip", "sample"),
    ("ncsn", "", "sample inpaint"), ("ncsn", "--settings 2019 --denoise", "sample inpaint"),
    ("ncsn", "--levels 0 --sigma-min 0.5", "sample"), ("ncsn", "--dataset gmm", ""),
    ("sliced_sm", "", "sample test cost"), ("sliced_sm", "--objective dsm", ""),
    ("sliced_sm", "--objective ssm --projection gaussian --num-projections 2", ""),
    ("sliced_sm", "--objective sm --projection sphere", ""),
    ("sliced_sm", "--levels 1 --data-noise 0.1", "sample"),
    *[("sliced_sm", f"--dataset gmm --levels 1 --objective {objective}", "sample")
      for objective in ("sm", "ssm", "dsm")],
    ("sliced_sm", "--dataset checkerboard --levels 1", "sample"),
    ("sde", "", "sample samplers bpd interpolate inpaint class"),
    ("sde", "--sde ve --sigma-max 5", "samplers bpd inpaint"),
    ("sde", "--sde subvp --dataset photos", "samplers colorize bpd"),
    ("sde", "--predictor ode", "sample"), ("sde", "--network ddpm++ --sde subvp", "sample bpd"),
    ("sde", "--network ncsn++ --sde ve --sigma-max 5", "sample bpd"),
    ("d3pm", "", "sample bpd infill"), ("d3pm", "--transition uniform --num-steps 2", "sample bpd"),
    ("d3pm", "--method multinomial --final-mode", "sample"),
    ("d3pm", "--transition gaussian", "sample bpd"),
    ("d3pm", "--transition gaussian --head logistic", "sample"),
    ("d3pm", "--dataset book.txt", "sample bpd infill"),
    ("d3pm", "--dataset book.txt --transition uniform", "sample"),
])
def test_every_task_runs_on_a_gpu(gpu, folder, name, words, tasks):
    module = SCRIPTS[name]
    gpu(module, f"{GPU_TINY} {GPU_OWN[name]} --steps 1 --out run {words}")
    for task in tasks.split():
        gpu(module, f"--checkpoint run/checkpoint.pt --task {task}")
        assert Path("run", task, "results.json").is_file()


def test_the_pretend_gpu_refuses_what_a_gpu_refuses():
    with CudaIsMeta(), PretendGpu() as mode:
        x = torch.ones(3, device=torch.device("cuda"))
        for wrong, match in ((lambda: x + torch.ones(3), "on cuda:0 and on the CPU"), (
                lambda: torch.randn(3, device=x.device, generator=torch.Generator()), "generator")):
            with pytest.raises(RuntimeError, match=match):
                wrong()
        x + torch.tensor(1.0)  # a CPU scalar is allowed, as on a GPU
        assert (x.device, mode.waits, mode.copies) == (torch.device("cuda:0"), 0, 0)
        for wait in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x[x > 0],
                     lambda: x.nonzero(), x.tolist):
            before = mode.waits
            wait()
            assert mode.waits > before
        x.cpu(), torch.ones(2).to(torch.device("cuda")), x[torch.tensor([0, 1])]
        assert mode.copies == 3 and x[[0, 2]].tolist() == [1, 1]


# ---- 2. At the edges: every sampler and loss -----------------------------------------------------

X, STATES = torch.zeros(2, 3), torch.zeros(2, 3).long()
SHORT, SIGMAS = d3pm.CategoricalDiffusion(3, 5), ncsn.geometric_sigmas(1.0, 0.01, 5)
LEVELS = SIGMAS.flip(0).tolist()
REFUSED = {  # function: arguments that are undefined
    ddpm.Schedule: [(1,), (10, 0.0, 0.1), (10, 0.1, 1.0), (10, 0.2, 0.1), (1000, 1e-4, 0.5)],
    ddpm.ddpm_sample: [(torch.add, X, ddpm.Schedule(5), "learned")],
    ddim.timesteps: [(10, 11), (10, 0), (10, 5, "cubic")],
    ddim.ddim_step: [(X, X, 5, 3, ddpm.Schedule(5), 1.5), (X, X, 3, 5, ddpm.Schedule(5), 0.5)],
    ncsn.geometric_sigmas: [(1.0, 0.1, 0), (0.1, 1.0, 5), (1.0, 0.0, 1)],
    ncsn.scales_technique2: [(1.0, 0.1, 4), (0.1, 1.0, 100)],
    ncsn.step_technique4: [(SIGMAS[:1], 5)],
    sliced_sm.sliced_score_matching: [(torch.sin, X, 0), (torch.sin, X, 1, "uniform")],
    sliced_sm.noisy_score_matching: [(torch.sin, X, 0.1, "mle"), (torch.sin, X, 0.0, "dsm")],
    d3pm.CategoricalDiffusion: [
        (3, 10, "band"), (1, 10), (3, 0), (15, 1000, "gaussian"),
        (3, 2, "uniform", torch.tensor([0, 0.5])), (3, 2, "uniform", torch.tensor([0.1, 0.5, 0.5])),
        (3, 2, "uniform", torch.tensor([0, 0.5, 1.5])),
        (3, 2, "uniform", torch.tensor([0, 0.5, math.nan])),
        (3, 2, "uniform", None, 1), (3, 2, "absorbing", None, 3),
    ],
    d3pm.skip_steps: [
        (None, SHORT, [1, 4]), (None, SHORT, [5, 2, 5]), (None, SHORT, [0, 5]), (None, SHORT, []),
        (None, categorical_diffusion("gaussian"), [2, 4]),
    ],
    d3pm.infill: [(None, STATES, STATES > 0, SHORT)],
    sde.VE: [(1.0, 0.5), (0.0, 0.5)],
    sde.VP: [(0.0, 20.0)],
    sde.SubVP: [(20.0, 0.1)],
    sde.pc_sample: [
        (torch.mul, sde.VP(), X, 30, "heun"), (torch.mul, sde.VP(), X, 30, "ancestral", "hmc"),
        (torch.mul, sde.VP(), X, 30, "none", "none"), (torch.mul, sde.SubVP(), X, 30, "ancestral"),
        (torch.mul, sde.VP(), X, 20, "ancestral", "none"), (torch.mul, sde.VE(), X, 0),
        (torch.mul, sde.SubVP(), X, 20, "euler_maruyama", "ald"),
    ],
    sde.log_likelihood: [(torch.mul, sde.VP(), X, 1e-5, 1e-5, "sphere")],
}


@pytest.mark.parametrize(("function", "arguments"), [
    (function, arguments) for function, every in REFUSED.items() for arguments in every])
def test_what_is_undefined_is_a_value_error(function, arguments):
    with pytest.raises(ValueError):
        function(*arguments)


SAMPLERS = {  # name: its numbers of steps
    "ddpm": (2, 16, 4000), "ddim": (1, 40), "d3pm": (1, 2, 40, 4000),
    "ve reverse_diffusion langevin": (1, 40), "vp none ald": (21,), "vp euler_maruyama none": (1,),
    "subvp reverse_diffusion none": (1, 40), "langevin": (2, 45), "annealed_langevin": (3, 45),
    "inpaint": (45,),
}


def run_sampler(name, N, callback):
    """The start and the result of a sampler with N steps; its model; when it should be called."""
    weight = torch.ones(1, requires_grad=True)  # of which no state may keep a graph
    model, x = Calls(lambda x, t=None: -weight * x), torch.randn(3, 1, 2, 4)
    times, sigmas = list(range(N, 0, -1)), ncsn.geometric_sigmas(2.0, 0.5, 3)
    schedule = ddpm.Schedule(max(N, 2), 0.1 / max(N, 2), min(0.9, 20 / N))
    if name == "ddpm":
        out = ddpm.ddpm_sample(model, x, schedule, callback=callback)
    elif name == "ddim":
        times[0] = schedule.T
        out = ddim.ddim_sample(model, x, schedule, times[::-1], 0.5, callback=callback)
    elif name == "d3pm":
        model, x = Calls(lambda x, t: weight * F.one_hot(x, 4)), torch.randint(4, x.shape)
        out = d3pm.d3pm_sample(model, x, d3pm.CategoricalDiffusion(4, N), callback=callback)
    elif name == "langevin":
        times, out = None, ncsn.langevin(model, x, 0.01, N, callback)
    elif name in ("annealed_langevin", "inpaint"):
        times = sigmas.repeat_interleave(N // 3).tolist()
        given = (x, torch.zeros(4), x) if name == "inpaint" else (x,)
        out = getattr(ncsn, name)(model, *given, sigmas, 0.01, N // 3, callback=callback)
    else:
        process, predictor, corrector = name.split()
        process, times, denoise = SDES[process], [], corrector != "ald"
        out = sde.pc_sample(model, process, x, N, predictor, corrector, 0.05, 2, denoise,
                            callback=callback)
        steps = [process.eps + (1 - process.eps) * i / N for i in range(N, -1, -1)]
        for t, s in zip(steps, steps[1:], strict=False):  # predictor at t, correctors at s
            times += [t] * (predictor != "none") + [s, s] * (corrector != "none")
        times += [process.eps] * denoise
    return x, out, model, times


class Shown(list):
    """A callback that is false as long as it has seen nothing."""

    def __call__(self, n, x):
        self.append((n, x))


@pytest.mark.parametrize(("name", "N"), [(name, N) for name in SAMPLERS for N in SAMPLERS[name]])
def test_samplers_evaluate_as_often_as_asked_and_show_every_state(name, N):
    shown = Shown()
    x_T, out, model, times = run_sampler(name, N, shown)
    assert out.isfinite().all() and out.shape == x_T.shape and not out.requires_grad
    assert name != "ddpm" or out.abs().max() <= 1  # unless it is told otherwise, it clips x_0_hat
    if times is not None:
        assert model.times() == pytest.approx(times)
        assert all(t.shape == (3,) for _, t in model)
        assert {t.dtype for _, t in model} == {torch.int64 if name in SCRIPTS else torch.float32}
    calls = len(model) // N  # of a step; what it begins with is the state of the first
    states = [*[call[0] for call in model][: N * calls : calls], out]
    assert [n for n, _ in shown] == list(range(N, -1, -1)) and torch.equal(states[0], x_T)
    assert equal([x for _, x in shown], states)


def test_chains_that_are_done_or_begin_late_or_end_by_denoising():
    """t_start 0 leaves x_T as it is; the state before a final denoising is not shown."""
    schedule, diffusion, x = ddpm.Schedule(5), d3pm.CategoricalDiffusion(3, 5), torch.randn(2, 3)
    for sampler, x_T, process in ((ddpm.ddpm_sample, x, schedule),
                                  (d3pm.d3pm_sample, torch.tensor([[2, 0, 1]]), diffusion)):
        model = Calls(lambda x_t, t: F.one_hot(x_t, 3).float() if x_t.dtype == torch.int64 else x_t)
        assert torch.equal(sampler(model, x_T, process, t_start=0), x_T) and not model
        times = []
        sampler(model, x_T, process, t_start=2, callback=lambda t, x, times=times: times.append(t))
        assert model.times() == [2, 1] and times == [2, 1, 0]
    sigmas, pull = ncsn.geometric_sigmas(1.0, 0.5, 2), lambda x, sigma: -x
    for N, chain in (
        (4, lambda show: ncsn.annealed_langevin(pull, x, sigmas, 0.1, 2, True, show)),
        (21, lambda show: sde.inpaint(pull, SDES["vp"], x, 0 * x, x, N=21, callback=show)),
    ):
        shown = {}
        out = chain(shown.__setitem__)
        assert [*shown] == list(range(N, -1, -1)) and torch.equal(shown[0], out)


@pytest.mark.parametrize(("loss", "levels"), [
    (lambda model, x: ddpm.ddpm_loss(model, x, ddpm.Schedule(5)), range(1, 6)),
    (lambda model, x: ddpm.vlb_loss(model, x, ddpm.Schedule(5)), range(1, 6)),
    (lambda model, x: ncsn.ncsn_loss(model, x, SIGMAS), LEVELS),
    (lambda model, x: sliced_sm.noise_conditional_loss(model, x, SIGMAS), LEVELS),
    (lambda model, x: sliced_sm.noise_conditional_loss(model, x, SIGMAS, "dsm"), LEVELS),
    (lambda model, x: d3pm.d3pm_loss(lambda x_t, t: F.one_hot(model(x_t, t), 3).float(),
                                     x.long(), SHORT), range(1, 6)),
])
def test_losses_draw_every_level_alike_and_leave_x(loss, levels):
    model, x = Calls(lambda x, t: 0 * x), torch.zeros(2000, 1, 1, 1)
    loss(model, x)
    drawn, counts = model[0][1].unique(return_counts=True)
    assert drawn.tolist() == pytest.approx(list(levels))
    within(counts, 400, 18.0, sigmas=4)
    assert not x.any() and not x.requires_grad


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_extreme_logits_give_no_nan(transition, size):
    K = 16
    diffusion = d3pm.CategoricalDiffusion(K, 5, transition)
    x_0 = torch.cat([torch.randint(K, (40, 3)), torch.full((20, 3), K // 2)])  # absorbed, too
    for state in (0, K - 1, K // 2):
        logits = torch.randn(60, 3, K) * size
        logits[:20] = -size
        logits[:20, :, state] = size
        logits.requires_grad_()
        loss = d3pm.d3pm_loss(lambda x_t, t, logits=logits: logits, x_0, diffusion)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        bits = d3pm.bits_per_dim(lambda x_t, t, logits=logits: logits, x_0, diffusion)
        assert bits["total"].isfinite().all()
    certain = torch.where(torch.arange(K) == K - 1, 0.0, -math.inf).expand(60, 3, K)
    x = d3pm.d3pm_sample(lambda x_t, t: certain, diffusion.prior_sample((60, 3)), diffusion)
    assert (x == K - 1).all()


def test_a_text_never_predicts_its_mask():
    diffusion, shown = d3pm.CategoricalDiffusion(5, 6, "absorbing", mask=4), {}
    weight, x_0 = torch.randn(5, 4, requires_grad=True), torch.randint(4, (200, 7))
    model = Calls(lambda x_t, t: F.pad(weight[x_t], (0, 1), value=-math.inf))
    d3pm.d3pm_loss(model, x_0, diffusion).backward()
    assert weight.grad.isfinite().all() and weight.grad[4].any()
    assert d3pm.bits_per_dim(model, x_0, diffusion)["total"].isfinite().all()
    x_T = diffusion.prior_sample((200, 7))
    x = d3pm.d3pm_sample(model, x_T, diffusion, callback=shown.__setitem__)
    assert x.max() < 4 and (shown[6] == 4).all()
    for t in range(6, 1, -1):  # a state stays until t = 1
        assert (shown[t - 1][shown[t] < 4] == shown[t][shown[t] < 4]).all()
    for T in (1, 2):  # the last step may take the mode
        diffusion, x_T = d3pm.CategoricalDiffusion(3, T), torch.randint(3, (50, 2, 3))
        mode = Calls(lambda x_t, t: torch.tensor([0.0, 3.0, 1.0]).expand(50, 2, 3, 3))
        x = d3pm.d3pm_sample(mode, x_T, diffusion, final_mode=True)
        assert torch.equal(x, torch.ones_like(x_T))


# ---- 2. At the edges: the networks ---------------------------------------------------------------

EVERY = pytest.mark.parametrize("make", [UNet, ddpm_plus_plus, ncsn_plus_plus])
SMALL = dict(num_res_blocks=1, channels=8, channel_mult=(1, 2, 2), attention_resolutions=(8,),
             dropout=0.0, image_size=16)


def awake(net, scale=0.1):
    """Weights that let every layer speak."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


@pytest.mark.parametrize(("make", "trained", "fixed"), [
    (UNet, 35_746_307, 0),
    (ddpm_plus_plus, 61_804_419, 0),
    (lambda: ddpm_plus_plus(num_res_blocks=8), 106_632_579, 0),
    (ncsn_plus_plus, 62_758_787, 128),
    (lambda: ncsn_plus_plus(num_res_blocks=8), 107_586_947, 128),
])
def test_networks_have_the_published_sizes(make, trained, fixed):
    with torch.device("meta"):
        net = make()
    assert sum(p.numel() for p in net.parameters()) == trained
    assert sum(b.numel() for b in net.buffers()) == fixed
    assert ("frequency" in net.state_dict()) == (fixed > 0)  # a checkpoint keeps it


@EVERY
def test_networks_start_as_the_released_ones(make):
    net = make(**SMALL | {"channels": 64, "channel_mult": (1, 2)})
    assert net(torch.randn(2, 3, 16, 16), torch.rand(2)).abs().max() < 1e-3  # almost zero
    conv, attention = net.down[0].conv1.weight, net.mid[0].attention
    limit = math.sqrt(6 / (64 * 9 + 64 * 9))  # variance 1 / mean(fan-in, fan-out), uniform
    assert 0.99 * limit < conv.abs().max() <= limit
    limit = math.sqrt((1 if make is UNet else 0.1) * 6 / (128 + 128))  # a tenth of DDPM's variance
    assert 0.99 * limit < attention.qkv.weight.abs().max() <= limit
    for last in (net.down[0].conv2, attention.out, net.conv_out):
        assert 0 < last.weight.abs().max() < 1e-5
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))
    if make is ncsn_plus_plus:  # N(0, 16^2)
        assert net.frequency.std().item() == pytest.approx(16, rel=3 / math.sqrt(2 * 64))


@EVERY
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 16, 12), (3, 3, 4, 20)])
def test_networks_take_any_size_that_halves(make, shape):
    B, C, H, W = shape
    settings = dict(num_res_blocks=2, channels=12, channel_mult=(1, 2, 1), dropout=0.5)
    net = awake(make(C, 5, **SMALL | settings)).eval()
    x = torch.randn(shape)
    for t in (torch.full((B,), 2), torch.full((B,), 2.0).double()):
        out = net(x, t)
        assert out.shape == (B, 5, H, W) and out.dtype == torch.float32
    assert torch.equal(out, net(x, t)) and not torch.equal(out, net(x, t + 0.3))
    assert not torch.equal(net.train()(x, t), net.train()(x, t))  # dropout
    attentions = sum("qkv.weight" in name for name, _ in net.named_parameters())
    assert attentions == 2 + 1 + (3 if make is UNet else 1)  # down, middle, up
    for size, match in (((C, 8, 6), "multiples of 4"), ((C + 1, 8, 8), f"takes {C} channels")):
        with pytest.raises(ValueError, match=match):
            net(torch.zeros(1, *size), torch.zeros(1))
    with pytest.raises(ValueError, match="multiple of 32"):
        make(channels=130)


def fir_resampled(x, up, down, before, after):
    """Zeros between and around the pixels, the filter with sum up^2, then every down-th pixel."""
    z = x.new_zeros(*x.shape[:2], up * x.shape[2], up * x.shape[3])
    z[:, :, ::up, ::up] = x
    kernel = torch.tensor([1, 3, 3, 1], dtype=x.dtype) * up / 8
    z = F.pad(z, (before, after, before, after)).flatten(0, 1).unsqueeze(1)
    z = F.conv2d(z, kernel.outer(kernel)[None, None])[:, 0, ::down, ::down]
    return z.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (7, 5)])
@pytest.mark.parametrize(("resample", "how"), [
    (lambda x: halve(x, True), (1, 2, 1, 1)), (lambda x: double(x, True), (2, 1, 2, 1)),
    (fir_blur, (1, 1, 2, 2)),
])
def test_fir_resampling_is_the_direct_one(resample, how, size):
    x = torch.randn(2, 3, *size).double()
    torch.testing.assert_close(resample(x), fir_resampled(x, *how), rtol=1e-12, atol=1e-12)
    x = torch.randn(1, 2, *size).double().requires_grad_()
    assert torch.autograd.gradcheck(resample, x) and torch.autograd.gradgradcheck(resample, x)


@EVERY
def test_networks_are_differentiated_twice(make):
    """The weights' gradient of v^T J v, attention included, equals central differences."""
    net = awake(make(1, 1, **SMALL).double(), 0.2)
    (x, v), weights = torch.randn(2, 2, 1, 8, 8).double(), list(net.parameters())
    x.requires_grad_()

    @sliced_sm.twice_differentiable
    def loss():
        out = (v * net(x, torch.ones(2))).sum()
        return (v * torch.autograd.grad(out, x, create_graph=True)[0]).sum()

    gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
    assert sum((g == 0).all() for g in gradients) == 1  # only the last bias leaves J unchanged
    along, values = [torch.randn_like(p) for p in weights], []
    for step in (1e-6, -2e-6):
        torch._foreach_add_([p.data for p in weights], along, alpha=step)
        values.append(loss().item())
    exact = sum((g * d).sum() for g, d in zip(gradients, along, strict=True)).item()
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(exact, rel=1e-4)


class Released:
    """The released networks from the weights of ours, written independently: one operation after
    another, q, k and v apart, softmax by hand. scale: of each sum with a residual."""

    def __init__(self, net, scale):
        self.w, self.scale = dict(net.named_parameters()), scale
        self.fir = "pyramid.0.weight" in self.w

    def conv(self, name, h, **options):
        return F.conv2d(h, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def dense(self, name, h):
        return h @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, h):  # 32 groups, or 4 channels a group below 128
        groups = min(32, h.shape[1] // 4)
        return F.group_norm(h, groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def block(self, name, h, resample=None):
        y = F.silu(self.norm(f"{name}.norm1", h))
        if resample and self.fir:
            how = {"down": (1, 2, 1, 1), "up": (2, 1, 2, 1)}[resample]
            h, y = (fir_resampled(z, *how) for z in (h, y))
        elif resample:
            h, y = (F.avg_pool2d(z, 2) if resample == "down" else doubled(z) for z in (h, y))
        y = self.conv(f"{name}.conv1", y, padding=1)
        y = y + self.dense(f"{name}.temb", self.temb)[:, :, None, None]
        y = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", y)), padding=1)
        h = self.conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in self.w else h
        h = (h + y) * self.scale
        if f"{name}.attention.out.weight" not in self.w:
            return h
        y = self.norm(f"{name}.attention.norm", h).flatten(2).mT
        q, k, v = self.dense(f"{name}.attention.qkv", y).chunk(3, dim=2)
        y = (q @ k.mT / math.sqrt(q.shape[2])).softmax(2) @ v
        return (h + self.dense(f"{name}.attention.out", y).mT.view_as(h)) * self.scale

    def forward(self, x, features, down, up):
        """down, up: what resamples after a block or None, block by block; "conv": as DDPM does."""
        time = F.silu(self.dense("time_mlp.0", features))
        self.temb = F.silu(self.dense("time_mlp.2", time))
        h, pyramid, convs = self.conv("conv_in", x, padding=1), x, 0
        skips = [h]
        for i, resample in enumerate(down):
            if resample == "conv":
                h = self.conv(f"down.{i}.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
            else:
                h = self.block(f"down.{i}", h, resample)
            if self.fir and resample:
                pyramid = fir_resampled(pyramid, 1, 1, 2, 2)
                h = pyramid = (h + self.conv(f"pyramid.{convs}", pyramid, stride=2)) * self.scale
                convs += 1
            skips.append(h)
        h = self.block("mid.1", self.block("mid.0", h))
        for i, resample in enumerate(up):
            if resample == "conv":
                h = self.conv(f"up.{i}.conv", doubled(h), padding=1)
            else:
                h = h if resample else torch.cat([h, skips.pop()], 1)
                h = self.block(f"up.{i}", h, resample)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)), padding=1)


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@EVERY
def test_networks_are_the_published_ones(make):
    if make is UNet:  # four levels, and widths above and below 128
        net, scale, t = UNet(3, 3, 64), 1.0, torch.tensor([0.0, 999.0])
        down = [None, None, "conv"] * 3 + [None, None]
        up = [None, None, None, "conv"] * 3 + [None] * 3
    else:
        net, scale = make(**SMALL | {"channels": 16}), math.sqrt(0.5)
        t = torch.tensor([3.5, 700.0] if make is ddpm_plus_plus else [0.3, -2.0])
        down, up = [None, "down", None, "down", None], [None, None, "up"] * 2 + [None, None]
    net, x = awake(net.double(), 0.05).eval(), torch.randn(2, 3, 16, 24).double()
    half = net.channels // 2
    angle = t[:, None] * torch.exp(-torch.arange(half) * math.log(10000) / (half - 1))
    if make is ncsn_plus_plus:
        angle = 2 * math.pi * t[:, None] * net.frequency
    features = torch.cat([torch.sin(angle), torch.cos(angle)], 1).double()
    with torch.no_grad():
        out, expected = net(x, t), Released(net, scale).forward(x, features, down, up)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# ---- 3. As a user --------------------------------------------------------------------------------

MADE = {}
BOOK = "It was -- as ever -- a DARK night, and in 1887 the wind had\nno mercy: none at all! " * 50


def save(path, colour, size=(8, 8), mode="RGB", **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a text, and 20 colour images in two classes below photos."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK)
    generator = np.random.default_rng(0)
    for i in range(20):
        path = Path("photos", "cat" if i % 2 else "dog", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (11, 17, 3), np.uint8)).save(path)
    return tmp_path


def run(words, module=ddpm):
    module.main([*TINY, *FEWER[module.METHOD], *words.split()])


def use(module, path, task="sample", words=""):
    """main() for this task on the checkpoint in the folder path: what results.json has about it."""
    words = ["--checkpoint", f"{path}/checkpoint.pt", "--task", task, *words.split()]
    module.main(words)
    return results(words[words.index("--out") + 1] if "--out" in words else f"{path}/{task}", task)


def refused(match, words, module=ddpm, tiny=True):
    """main() ends with an error that says this: argparse's of a flag, or Python's."""
    words, stderr = words.split(), io.StringIO()
    words = [*TINY, *FEWER[module.METHOD], *words] if tiny else words
    with redirect_stderr(stderr), pytest.raises((SystemExit, ValueError, OSError)) as error:
        module.main(words)
    message = str(error.value)
    if error.type is SystemExit:
        assert message == "2"
        message = stderr.getvalue().splitlines()[-1]
    assert re.search(match, message), message


def parse(module, *words):
    """The arguments of main(words), as it hands them to setup."""
    stop = Mock(side_effect=InterruptedError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "setup", stop)
        patch.setattr(d3pm, "CategoricalDiffusion", Mock())  # not a thousand steps' matrices
        with pytest.raises(InterruptedError):
            module.main([*words])
    return stop.call_args.args[0]


def load(dataset, *size, channels=0):
    """load_images: images and labels of the training split, and of the test split."""
    args = SimpleNamespace(dataset=str(dataset), data_dir="data", image_channels=channels,
                           image_size=[size[0], size[-1]])
    train = ddpm.load_images(args, "cpu")
    args.image_channels = train[0].shape[1]
    return train, ddpm.load_images(args, "cpu", 10**6)


def load_state(path):
    """The checkpoint in a folder, or in a file of another name."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else path
    return ddpm.load_checkpoint(path, {*SCRIPTS, "sde's classifier"})


def weights_of(path):
    state = load_state(path)
    return {key: state[key] for key in ("method", "step", "model", "ema", "optimizer")}


def contents(path, kind="*"):
    """The files of a kind below a folder, with their bytes."""
    files = [file for file in Path(path).rglob(kind) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def pictures(path):
    return contents(path, "*.png")


def files_of(path):
    return {file.name for file in Path(path).iterdir()}


def equal(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def log_lines(path):
    return [json.loads(line) for line in Path(path, "log.jsonl").read_text().splitlines()]


def results(path, task=None):
    """results.json of a folder, or what it says about a task."""
    found = json.loads(Path(path, "results.json").read_text())
    return found if task is None else found[task]


@pytest.fixture
def take(folder, tmp_path_factory):
    """A function that copies these scripts' tiny runs, made once, into folders of their names."""

    def copy(*names):
        for name in names:
            if name not in MADE:
                MADE[name] = tmp_path_factory.mktemp(name) / "run"
                run(f"--out {MADE[name]} {'--image-size 8' * (name == 'sde')}", SCRIPTS[name])
            shutil.copytree(MADE[name], name)

    return copy


@pytest.fixture
def calls(monkeypatch):
    """All calls of UNet.forward from now on."""
    seen, forward = [], UNet.forward

    def spy(net, x, t):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append(SimpleNamespace(x=x, t=t, training=net.training, autocast=autocast))
        return forward(net, x, t)

    monkeypatch.setattr(UNet, "forward", spy)
    return seen


@pytest.mark.parametrize(("name", "evaluations", "columns"), [  # of a sample; of process.png
    ("ncsn", 9, 9), ("ddpm", 20, 16), ("ddim", 5, 6), ("sde", 13, 7), ("sliced_sm", 9, 9),
    ("d3pm", 20, 16),
])
def test_a_run_and_its_samples_once_more(take, name, evaluations, columns):
    take(name)
    assert files_of(name) == {
        "checkpoint.pt", "images", "log.jsonl", "process.png", "results.json", "samples.png"}
    log, found, settings = log_lines(name), results(name), load_state(name)["settings"]
    assert [line["step"] for line in log] == [1, 2, 4]
    assert log[0].keys() == {"step", "loss", "grad_norm", "lr"}
    assert found["arguments"] == settings and settings["num_samples"] == 3
    assert found["step"] == 4 and found["torch"] == torch.__version__ and "date" in found
    assert found.keys() - {"arguments", "step", "torch", "date"} <= {"sample", "bpd", "test"}
    assert (found["sample"]["n"], found["sample"]["evaluations"]) == (3, evaluations)
    for picture, width in (("process", columns), ("samples", 2)):  # 2 rows
        assert Image.open(f"{name}/{picture}.png").size == (width * 50 + 2, 2 * 50 + 2)
    use(SCRIPTS[name], name, words="--sample-batch-size 2")
    first, again = pictures(f"{name}/images"), pictures(f"{name}/sample/images")
    assert len(first) == 3 and first == again  # same seed, same images


def test_bounds_of_ddpm_and_d3pm_and_flags_of_samples(take, monkeypatch):
    take("ddpm", "d3pm")
    for name in ("ddpm", "d3pm"):
        found = results(name, "bpd")
        bits = found["bits_per_dim"]
        assert bits["total"] == pytest.approx(bits["L_T"] + bits["L_t"] + bits["L_0"])
        if name == "ddpm":
            table = found["steps_rate_rmse"]
            assert [row[0] for row in table] == [*range(20, 0, -2)] and found["n"] == 3
            assert table[0][1] == pytest.approx(bits["L_T"] + bits["L_t"])
    levels = np.unique(np.array(Image.open("d3pm/images/000000.png"))).tolist()
    assert {*levels} <= {0, 64, 128, 191, 255} and bits["L_T"] == 0
    bits = {"L_T": torch.tensor([1.0, 3.0]), "L_t": torch.tensor([[20.0, 10.0], [40.0, 30.0]]),
            "mse": torch.tensor([[0.01, 0.04, 1.0], [0.03, 0.04, 1.0]])}  # t = 1, 2, 3
    rate, rmse = ddpm.rate_distortion(bits)  # DDPM Table 4, by reverse time
    assert rate.tolist() == [2, 22, 52]  # x_3; x_3, x_2; x_3, x_2, x_1
    torch.testing.assert_close(rmse, 127.5 * torch.tensor([1.0, 0.2, math.sqrt(0.02)]))
    known = {"total": torch.tensor([1.0, 2, 4, 9]), "L_t": torch.zeros(4, 19)}
    known |= dict.fromkeys(("L_T", "L_0"), torch.zeros(4)) | {"mse": torch.ones(4, 20)}
    for module, path in ((ddpm, "ddpm"), (d3pm, "d3pm")):
        monkeypatch.setattr(module, "bits_per_dim", lambda *_: known)
        found = use(module, path, "bpd", "--num-test 4 --sample-batch-size 4")["bits_per_dim"]
        assert found["standard_error"] == pytest.approx(math.sqrt(38 / 3 / 4), abs=1e-4)
    sampler = Mock(wraps=ddpm.ddpm_sample)
    monkeypatch.setattr(ddpm, "ddpm_sample", sampler)
    use(ddpm, "ddpm", words="--variance small --no-clip")
    assert {call.args[3:] for call in sampler.call_args_list} == {("small", False)}


@pytest.mark.parametrize(("name", "module", "words", "given"), [
    # a checkpoint, what is done with it, and the times that its network is given
    ("ddpm", ddpm, "", range(20)), ("ddpm", ddpm, "--task bpd", range(20)),  # t - 1
    ("ddpm", ddim, "--num-steps 5", range(3, 20, 4)), ("ncsn", ncsn, "", {0}),
    ("ncsn", ncsn, "--task inpaint", {0}), ("sliced_sm", sliced_sm, "", range(4)),
    ("sliced_sm", sliced_sm, "--task test", range(4)), ("d3pm", d3pm, "", range(20)),
    ("d3pm", d3pm, "--num-steps 4", range(4, 20, 5)), ("d3pm", d3pm, "--task bpd", range(20)),
    ("d3pm", d3pm, "--num-steps 4 --task bpd", range(4, 20, 5)),
    ("sde", sde, "--num-steps 9 --corrector none --predictor euler_maruyama",
     [999 * (0.001 + 0.111 * i) for i in range(10)]),  # 999 t
    ("ddpm", sde, "--num-steps 19 --corrector none", range(20)),  # T t - 1
    ("ddpm", sde, "--task bpd --tolerance 0.1", 0),  # the least; t_min is 1 / T
    ("sde", sde, "--task bpd --tolerance 0.1", 999e-5), ("sde", sde, "--predictor ode", 0.999),
    ("ddpm", ddim, "--task reconstruct", 0), ("sde", sde, "--task interpolate", 0.999),
])
def test_what_times_and_precision_the_network_is_given(take, calls, name, module, words, given):
    """What is measured is in float32, whatever --bf16 says: samples heed that, but do not take it
    from a checkpoint."""
    take(name)
    state = load_state(name)
    torch.save(state | {"settings": state["settings"] | {"bf16": True}}, f"{name}/checkpoint.pt")
    for flag in ("", "--bf16"):
        calls.clear()
        module.main(f"--checkpoint {name}/checkpoint.pt --out x{flag} {words} {flag}".split())
        assert not any(call.training for call in calls)
        low = flag and not re.search("bpd|test|reconstruct|interpolate|ode", words)
        assert {call.autocast for call in calls} == {bool(low)}
    found = sorted({round(t, 4) + 0.0 for call in calls for t in call.t.tolist()})
    if isinstance(given, (int, float)):
        found, given = found[:1], [given]
    assert found == pytest.approx(list(given), abs=1e-3)
    assert module is not d3pm or all(call.x.abs().max() <= 1 for call in calls)


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=SCRIPTS)
def test_resume_is_bit_for_bit_with_previews_and_without(folder, module):
    """Nor do a log or results that were cut short stand in the way."""
    flags = "--flip --dropout 0.1 --warmup 3 --log-every 3 --save-every 2"
    run(f"{flags} --steps 10 --out whole --preview 2", module)
    run(f"{flags} --steps 5 --out parts --preview 0", module)
    with open("parts/log.jsonl", "a") as file:  # as after a crash past the checkpoint
        file.write('{"step": 6, "loss": 0.0}\n{"step": 7, "lo')
    Path("parts/results.json").write_text('{"argu')
    Path("parts/images/000009.png").write_bytes(b"of an older network")
    module.main("--resume --out parts --steps 10 --preview 0".split())
    assert load_state("whole")["step"] == 10 and equal(weights_of("whole"), weights_of("parts"))
    whole, parts = (contents(out)["log.jsonl"].splitlines() for out in ("whole", "parts"))
    assert [json.loads(line)["step"] for line in whole] == [1, 2, 3, 4, 6, 8, 9, 10]
    assert whole[-3:] == parts[-3:] and pictures("whole/images") == pictures("parts/images")
    assert files_of("whole") - files_of("parts") == {f"samples-{n}.png" for n in (2, 4, 8)}
    assert Image.open("whole/samples-8.png").size == (2 * 50 + 2, 50 + 2)
    assert results("parts")["step"] == 10


MISTAKES = {  # what is wrong, and what the last line says
    "ddpm": [
        ("--dataset nowhere", "no training images in nowhere: take digits, mnist"),
        ("--dataset empty", "no training images in empty"),
        ("--dataset broken", "cannot read broken/3.png: .*truncated"),
        ("--dataset deep", "cannot read deep/0.png: more than 8 bits per channel"),
        ("--image-size 17", "multiples of 2"),
        ("--lr nan", "--lr: nan is not a finite number >= 0"),
        ("--dropout 1.5", "dropout"),
        ("--image-channels 2", "--image-channels: invalid choice: 2"),
        ("--steps -1", "--steps: -1 is not a finite number"),
        ("--attention-resolutions 16 --image-size 48 --channel-mult 1 1 1 1",
         "--attention-resolutions: .*48, 24, 12, 6"),
        ("--T 1", "need T >= 2"), ("--mix-at 21", "--mix-at 21 is beyond"),
        ("--channels 130", "multiple of 32"),
        ("--resume", "runs/ddpm-digits/checkpoint.pt is missing, damaged .* No such file"),
        ("--checkpoint truncated.pt", "truncated.pt is missing, damaged"),
        ("--checkpoint text.pt", "text.pt is missing, damaged"),
        ("--checkpoint hostile.pt", r"^hostile.pt is missing, damaged [^\n]*\Z"),
        ("--checkpoint keyless.pt", "keyless.pt is missing, damaged .* 'ema'"),
        ("--checkpoint nan.pt", "nan.pt .* not finite"),
        ("--checkpoint ddim/checkpoint.pt", "not one of ddpm: it is a checkpoint of ddim"),
        ("--checkpoint ddpm/checkpoint.pt --channels 16", "--channels: the checkpoint has 8"),
        ("--checkpoint ddpm/checkpoint.pt --T 10", "--T: the checkpoint has 20"),
        ("--out ddpm", r"ddpm is not empty: --out OTHER, or --resume"),
        ("--out photos --checkpoint ddpm/checkpoint.pt", "photos is not empty: --out"),
        ("--out ddpm --resume --steps 3", "--steps 3: the checkpoint has done 4 already"),
        ("--resume --checkpoint ddpm/checkpoint.pt", "not allowed with argument --resume"),
        ("--out photos/cat/1.png/run", "photos/cat/1.png"),
    ],
    "ddim": [
        ("--num-steps 21", "21 steps are not within 1..20"),
        ("--eta 1.5", "--eta 1.5 is more than 1"),
        ("--checkpoint ncsn/checkpoint.pt", "not one of ddim or ddpm: it is a checkpoint of ncsn"),
        ("--resume --out ddpm", "not one of ddim: it is a checkpoint of ddpm"),
        ("--checkpoint ddpm/checkpoint.pt --variance analytic --sigma-hat", "two choices"),
    ],
    "ncsn": [
        ("--dataset gmm --task inpaint", "gmm takes"),
        ("--dataset gmm --eps 1e9 --T 20", "chains diverge"),
        ("--levels 1 --eps 0", "--eps needs a number"),
        ("--sigma-max 0.001", "need L >= 1, falling"),
        ("--checkpoint ncsn/checkpoint.pt --sigma-max 2", "--sigma-max: the checkpoint has 7.38"),
        ("--checkpoint ncsn/checkpoint.pt --eps 1e30", "not finite: --eps is too large"),
    ],
    "sde": [
        ("--num-steps 4", "N = 4 steps are too few"),
        ("--checkpoint sde/checkpoint.pt --task class --predictor ode", "other than ode"),
        ("--task class", "takes the --checkpoint"),
        ("--sde ve --sigma-max 0.001", "sigma from 0.01 to 0.001"),
        ("--task colorize", "takes colour images"), ("--deep", "--deep"),
        ("--checkpoint ddpm/checkpoint.pt", "--beta-max: the checkpoint has its own"),
        ("--checkpoint ddpm/checkpoint.pt --sde ve", "--sde: the checkpoint has vp"),
    ],
    "sliced_sm": [
        ("--dataset gmm --task test", "gmm takes --task sample, --levels 1"),
        ("--dataset gmm --levels 1 --flip", "gmm takes .* --no-flip"),
        ("--data-noise 0.1", "--data-noise takes --levels 1"),
        ("--levels 1 --task test", "--task test"), ("--levels 1 --objective dsm", "needs noise"),
        ("--checkpoint sliced_sm/checkpoint.pt --dataset gmm", "have different networks"),
    ],
    "d3pm": [
        ("--method multinomial --hybrid 0.1", "multinomial is the uniform"),
        ("--transition gaussian --levels 15", "needs K >= 16 states, not 15"),
        ("--transition gaussian --num-steps 10", "Gaussian transition has no closed form"),
        ("--num-steps 21", "num-steps 21 is more than --T 20"),
        ("--transition uniform --task infill", "infill needs --transition absorbing"),
        ("--dataset book.txt --length 400", "--length 400 needs 16000"),
        ("--dataset latin.txt", "latin.txt is not text8.zip or a UTF-8 text"),
        ("--dataset russian.txt", "russian.txt has 401 characters of a to z and spaces"),
    ],
}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "words", "match"), [(name, *case) for name in MISTAKES for case in MISTAKES[name]])
def test_mistakes_are_named_and_overwrite_nothing(take, name, words, match):
    take("ddpm", *{run for run in SCRIPTS if f" {run}/" in words} - {"ddpm"})
    good = Path("ddpm/checkpoint.pt").read_bytes()
    Path("truncated.pt").write_bytes(good[: len(good) // 2])
    nan = {"step": 1, "settings": {"dataset": ""}, "ema": {"w": torch.tensor([1.0, math.nan])}}
    for path, state in (("keyless.pt", {}), ("nan.pt", nan), ("hostile.pt", {"ema": Hostile()})):
        torch.save({"method": "ddpm"} | state, path)
    Path("empty").mkdir()
    for path in ("broken", "deep"):
        shutil.copytree("photos", path)
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save("deep/0.png")
    Path("broken/3.png").write_bytes(Path("broken/cat/1.png").read_bytes()[:200])
    Path("text.pt").write_text("weights")
    Path("latin.txt").write_text("d\u00e9j\u00e0 vu " * 100, "latin-1")
    Path("russian.txt").write_text("\u0412\u043e\u0439\u043d\u0430 \u0438 leo " * 100, "utf-8")
    before = contents(".")
    refused(match, words, SCRIPTS[name])
    assert contents(".") == before and not Path("executed").exists()


def test_no_flipped_byte_loads_wrong_values(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"method": "ddpm", "step": 3, "settings": {"dataset": "digits"},
             "ema": {"w": torch.randn(40), "b": torch.ones(3)}}
    torch.save(state, path)
    good, refused = path.read_bytes(), 0
    for i in range(good.index(b"PK\1\2")):  # where the archive's directory begins
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        try:
            assert equal(load_state(path), state), f"byte {i}"
        except ValueError:
            refused += 1
    assert refused > 500


def start(words):
    """ddpm.py in a process of its own, one thread."""
    command = [sys.executable, "-u", ROOT / "ddpm.py", *TINY, *FEWER["ddpm"], *words.split()]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def test_signals_kill_and_resume(folder):
    """However seldom a line is logged, SIGTERM and Ctrl-C are obeyed within a step."""
    process = start("--steps 1000000 --out run --save-every 1 --preview 0")
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()  # kill -9, in the middle of saving as likely as not
    process.communicate()
    step = load_state("run")["step"]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start("--steps 1000000 --out run --resume --save-every 1000000 --log-every 10000")
        while "parameters, data [4500" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        time.sleep(1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        before, step = step, load_state("run")["step"]
        assert process.returncode == 128 + number and step > before > 0
        assert f"stopped after step {step}, saved as run/checkpoint.pt: repeat" in out


def test_copied_alone_they_still_run(take):
    """A script under another name and unet.py in an empty folder, on a folder of images."""
    take("ddpm")
    Path("driver.py").write_text("""
import json, os, runpy, sys
for name, words in json.loads(sys.argv[1]):
    os.chdir(name)
    sys.modules.pop("unet", None)
    sys.path[0], sys.argv = os.getcwd(), [name, *words]
    runpy.run_path(f"my_{name}.py", run_name="__main__")
    assert sys.modules["unet"].__file__ == os.path.abspath("unet.py")
    os.chdir("..")
""")
    jobs = [("ddpm", ["--checkpoint", "checkpoint.pt"])]  # of the original
    for name in SCRIPTS:
        Path(name).mkdir(exist_ok=True)
        shutil.copy(ROOT / f"{name}.py", f"{name}/my_{name}.py")
        shutil.copy(ROOT / "unet.py", name)
        words = "--dataset ../photos --image-size 4 8 --attention-resolutions"
        jobs.append((name, [*TINY, *FEWER[name], *words.split()]))
    command = [sys.executable, "driver.py", json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pictures("ddpm/sample/images") == pictures("ddpm/images")
    for name in SCRIPTS:
        image = Image.open(f"{name}/runs/{name}-photos/images/000000.png")
        assert image.mode == "RGB" and image.size == (8, 4)


def test_a_mistake_in_ones_own_loss_shows_its_line(folder, monkeypatch):
    def mine(model, x_0, schedule):
        return x_0 @ torch.ones(5)  # the mistake

    monkeypatch.setattr(ddpm, "ddpm_loss", mine)
    with pytest.raises(RuntimeError, match="size mismatch") as error:
        run("")
    assert traceback.extract_tb(error.tb)[-1].line == "return x_0 @ torch.ones(5)  # the mistake"


def test_a_host_that_is_no_console_and_any_seed(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without reconfigure
    run("--steps 1 --seed 99999999999999999999")
    assert "step 1 of 1" in sys.stdout.getvalue() and load_state("runs/ddpm-digits")["step"] == 1


@pytest.mark.parametrize(("name", "task"), [
    ("ddpm", "bpd"), ("ddpm", "interpolate"), ("ddim", "reconstruct"), ("ncsn", "inpaint"),
    ("sliced_sm", "test"), ("d3pm", "bpd"), ("d3pm", "infill"), ("sde", "bpd"),
    ("sde", "interpolate"), ("sde", "inpaint"), ("sde", "class"),
])
def test_too_few_test_images_are_an_error_and_one_is_enough(take, name, task):
    """Except to interpolate between two. No warning, no NaN in results.json."""
    take(name)
    for i, path in enumerate(("train/a/0.png", "train/b/1.png", "test/b/2.png")):
        save(f"one/{path}", 40 * i, mode="L")
    words = f"--checkpoint {name}/checkpoint.pt --dataset one --task {task} --num-samples 2 --out"
    if task == "interpolate":
        return refused("needs two test images", f"{words} x", SCRIPTS[name], tiny=False)
    if (name, task) not in (("sde", "inpaint"), ("sde", "class")):  # these have no --num-test
        refused("no test images in one", f"{words} x --num-test 0", SCRIPTS[name], tiny=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the deviation of one number
        SCRIPTS[name].main(f"{words} y --num-test 1".split())
    assert "NaN" not in Path("y/results.json").read_text() and results("y", task)["n"] in (1, 2)


@pytest.mark.parametrize("name", SCRIPTS.keys() - {"d3pm"})  # whose samples are states
def test_samples_that_are_not_finite_are_an_error(take, monkeypatch, name):
    take(name)
    monkeypatch.setattr(UNet, "forward", lambda net, x, t: x * math.nan)
    refused("not finite", f"--checkpoint {name}/checkpoint.pt --out x", SCRIPTS[name], tiny=False)
    assert not pictures("x")
    monkeypatch.setitem(SCRIPTS[name].TASKS, "sample", lambda *_: {"n": math.nan})  # not JSON
    refused("JSON", f"--checkpoint {name}/checkpoint.pt --out y", SCRIPTS[name], tiny=False)


def by_hash(paths):
    return sorted(paths, key=lambda path: zlib.crc32(path.encode()))


def in_test(paths):
    """The files that are kept for testing, by the rule of the README."""
    return [x for x in by_hash(paths) if zlib.crc32(x.encode()) % 10 == 0] or by_hash(paths)[:1]


FLAT = [f"{i}.png" for i in range(40)] + ["0a.png"]
@pytest.mark.parametrize(("paths", "test", "classes"), [
    # the files of a folder; those for testing, None: by the README's rule; the classes
    (FLAT, None, ()),
    (sorted({*FLAT} - {*in_test(FLAT)}), None, ()),  # no hash is a multiple of 10
    ([*FLAT, *(f"{'cat' if i % 2 else 'dog'}/old/{i}.png" for i in range(20))], None,
     ("cat", "dog")),
    *[(["Train/a/0.png", "Train/b/1.png", "Train/2.png", f"{name}/b/3.png", f"{name}/c/4.png"],
       [f"{name}/b/3.png", f"{name}/c/4.png"], ("a", "b", "c"))
      for name in ("test", "Val", "VALID", "validation")],
])
def test_folders_give_splits_and_classes(tmp_path, paths, test, classes):
    for red, path in enumerate(paths):
        save(tmp_path / path, (red, 0, 0))
    test = by_hash(in_test(paths) if test is None else test)
    train = by_hash({*paths} - {*test})
    for (images, labels), expected in zip(load(tmp_path, 8, 4), (train, test), strict=True):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (len(expected), 3, 8, 4)
        assert [paths[red] for red in images[:, 0, 0, 0]] == expected  # the first: a fair sample
        assert labels.tolist() == [
            next((k for k, name in enumerate(classes) if f"{name}/" in path), -1)
            for path in expected]


def test_what_is_read_from_a_folder(folder, monkeypatch):
    for i, kind in enumerate("JPG jpeg png webp bmp tif TIFF ppm".split()):
        save(f"many/a/{i}.{kind}", (20 * i, 10, 30))
    save("elsewhere/linked.png", 90, mode="L")
    os.symlink(Path("elsewhere").resolve(), "many/b")
    for name in (".ipynb_checkpoints", "__MACOSX", "a/.hidden"):
        save(f"many/{name}/1.png", (0, 0, 0))
    for name in ("a/._x.png", "Thumbs.db", "notes.txt", "a/moving.gif"):
        Path("many", name).write_bytes(b"not an image")
    monkeypatch.chdir("many")
    for run_before in (False, True):  # whose samples are left out
        if run_before:
            run("--steps 1 --dataset . --image-size 8 --num-samples 1 --attention-resolutions")
            assert Path("runs/ddpm-many/images/000000.png").exists()
        (images, labels), (test, more) = load(".", 8)
        assert len(images) + len(test) == 9 and {*labels.tolist(), *more.tolist()} == {0, 1}
    save("grey/train/0.png", 40, mode="L")
    save("grey/train/1.png", (7, 7, 7))  # equal channels are grey, too
    save("grey/test/0.png", (255, 0, 0))
    (images, _), (test, _) = load("grey", 8)  # grey, as its training split is
    assert images.shape[1] == test.shape[1] == 1 and test[0, 0, 0, 0] == 76
    assert load("grey", 8, channels=3)[0][0].shape == (2, 3, 8, 8)
    save("grey/train/2.png", (255, 0, 0))
    assert load("grey", 8)[0][0].shape[1] == 3
    assert load("grey", 8, channels=1)[0][0].shape[1] == 1


def test_unusual_files_that_are_good(tmp_path):
    turned, palette = Image.Exif(), Image.new("P", (8, 4))
    turned[0x0112] = 3  # by 180 degrees
    palette.putpalette([0, 0, 0, 9, 9, 9])
    half, white = [[0] * 3] * 4 + [[255] * 3] * 4, [[255] * 3] * 8
    pixels = np.array([half[::-1]] * 4, np.uint8)
    wide = np.hstack([pixels, np.full((4, 8, 3), 200, np.uint8), pixels])
    files = [  # what it is saved from, with which options; the first row of pixels, about
        (Image.new("CMYK", (8, 4), (0, 255, 255, 0)), {"format": "JPEG"}, [[255, 0, 0]] * 8),
        (Image.fromarray(pixels), {"exif": turned}, half),
        (Image.fromarray(wide), {}, [[200] * 3] * 8),  # cropped at the centre
        (Image.new("1", (8, 4), 1), {}, white),
        (Image.new("RGBA", (8, 4), (0, 0, 0, 255)), {}, [[0] * 3] * 8),
        (Image.new("LA", (8, 4), (0, 0)), {}, white),  # transparency is white
        (palette, {"transparency": 0}, white),
    ]
    save(tmp_path / "test/0.png", (0, 0, 0))
    (tmp_path / "train").mkdir()
    paths = by_hash(f"train/{i}.png" for i in range(len(files)))
    for path, (image, options, _) in zip(paths, files, strict=True):
        image.save(tmp_path / path, **{"format": "PNG"} | options)
    images, rows = load(tmp_path, 4, 8)[0][0], torch.tensor([row for _, _, row in files])
    torch.testing.assert_close(images[:, :, 0].mT.long(), rows, rtol=0, atol=3)


def test_bundled_digits():
    (train, labels), (test, test_labels) = load("digits", 16)
    assert train.shape == (4500, 1, 16, 16) and test.shape == (500, 1, 16, 16)
    assert labels.bincount().tolist() == [450] * 10
    assert test_labels.tolist() == [*range(10)] * 50  # so that the first ones are a fair sample
    both = torch.cat([train, test])
    assert len(both.flatten(1).unique(dim=0)) == 5000  # no test digit is a training digit
    assert (both[:, :, [0, -1]] == 0).all() and (both[:, :, :, [0, -1]] == 0).all()  # the padding
    means = torch.stack([train[labels == k].float().mean(0) for k in range(10)])
    near = torch.cdist(test.float().flatten(1), means.flatten(1)).argmin(1)
    assert (near == test_labels).float().mean() > 0.75  # the tiles are cut and labelled right


def test_data_sets_of_torchvision(folder, monkeypatch):
    pixels, labels = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8), [3, 0, 9, 1, 2]
    for name, data, targets in (("CIFAR10", pixels.numpy(), labels),
                                ("MNIST", pixels[:, :28, :28, 0], torch.tensor(labels))):
        kind = Mock(return_value=SimpleNamespace(data=data, targets=targets))
        monkeypatch.setattr(torchvision.datasets, name, kind)
    assert equal(load("cifar10", 32)[0], (pixels.movedim(3, 1), torch.tensor(labels)))
    run("--dataset mnist --channel-mult 1 1 --num-res-blocks 1 --out mnist")
    assert equal(load("mnist", 28)[1][0], pixels[:, None, :28, :28, 0])
    fetch, first, second = {"download": True}, {"train": True}, {"train": False}
    assert [x.kwargs for x in kind.call_args_list[-4:]] == [fetch, first, fetch, second]
    refused("--image-channels 3, but mnist has others", "--dataset mnist --image-channels 3")


def fit_toy(words, loss_fn, *data):
    """Trains the weights w = (1, -2) of a module in the folder run, at a rate of 0.1, and returns
    it; path gets its weights before each step. loss_fn(w, *rows)."""
    rate, toy, path = "--lr 0.1 --warmup 0 --lr-decay 0 --out run", torch.nn.Module(), []
    toy.w, toy.forward = torch.nn.Parameter(torch.tensor([1.0, -2.0])), lambda rows: toy.w

    def loss(net, *rows):
        path.append(toy.w.detach().clone())
        return loss_fn(net(rows[0]), *rows)

    args = parse(ddpm, *TINY, *rate.split(), *words.split())
    ddpm.fit(toy, loss, data or (torch.arange(9),), args, ddpm.setup(args))
    path.append(load_state("run")["model"]["w"])
    return toy, path


def test_ema_learning_rate_and_clipping(folder):
    """Where gradients are constant, Adam's steps are as long as the learning rate."""
    words = "--steps 16 --ema-decay 0.5 --warmup 4 --lr-decay 0.5"
    toy, path = fit_toy(words, lambda w, rows: (w * 100).sum())
    ema, rates = path[0], [0.025, 0.05, 0.075] + [0.1 * (n / 4) ** -0.5 for n in range(4, 17)]
    for n, rate in enumerate(rates, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * path[n]
        torch.testing.assert_close(path[n - 1] - path[n], torch.full((2,), rate))
    torch.testing.assert_close(toy.w.detach(), ema)
    log = log_lines("run")
    assert log[0]["grad_norm"] == pytest.approx(100 * math.sqrt(2))
    assert {line["step"]: line["lr"] for line in log} == pytest.approx(
        {step: rates[step - 1] for step in (1, *range(2, 17, 2))})
    shutil.rmtree("run")
    sizes = iter([100.0, 1.0])  # clipped, Adam sees 1 and 1: both steps are equally long
    _, path = fit_toy("--steps 2", lambda w, rows: next(sizes) * w.sum() / math.sqrt(2))
    torch.testing.assert_close(path[1] - path[2], torch.full((2,), 0.1))


def test_a_full_disk_keeps_the_last_checkpoint(folder):
    run("--out run --steps 2")
    good = Path("run/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            run("--out run --resume --steps 4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("run/checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("loss", [lambda w: w.sum() * math.nan, lambda w: (w - w).sqrt().sum()])
def test_what_is_not_finite_ends_the_run_and_keeps_its_checkpoint(folder, loss):
    """The second one is 0, but its gradient is not finite."""
    count = iter(range(99))
    with pytest.raises(ValueError, match="not finite, try a lower --lr: .*'step': 8"):
        fit_toy("--steps 40 --save-every 6 --log-every 8",
                lambda w, rows: w.sum() if next(count) < 7 else loss(w))
    state = load_state("run")
    assert next(count) == 8 and state["step"] == 6 and state["model"]["w"].isfinite().all()
    assert [line["step"] for line in log_lines("run")] == [1, 6]
    shutil.rmtree("run")
    with pytest.raises(ValueError, match="weights not finite, try a lower --lr: .*'step': 1"):
        fit_toy("--lr 1e39", lambda w, rows: w.sum())
    assert not Path("run/checkpoint.pt").exists()


def test_rows_of_all_parts_stay_together_and_flips_mirror(folder):
    images = torch.arange(50 * 6, dtype=torch.uint8).view(50, 1, 2, 3)

    def loss_fn(w, rows, labels):
        plain = (rows == images[labels]).flatten(1).all(1)
        mirrored = (rows == images[labels].flip(-1)).flatten(1).all(1)
        assert (plain ^ mirrored).all() and rows.dtype == torch.uint8
        assert abs(mirrored.float().mean() - 0.5) < 0.1
        return w.sum()

    fit_toy("--batch-size 400 --flip", loss_fn, images, torch.arange(50))


def torchrun(*command, processes=2):
    """What these processes print, or that of one without torchrun."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *(launcher if processes > 1 else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, text=True, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


DRIVER = """
import os, torch, sliced_sm
from sliced_sm import RANK, WORLD
from unet import UNet

words = "--batch-size 4 --steps 2 --warmup 0 --lr 0.1 --device cpu --out".split()
args, _, _ = sliced_sm.read_args([*words, f"runs{WORLD}/first"])
device, data = sliced_sm.setup(args), torch.rand(4, 1, 4, 4)
start = UNet(1, 1, 4, (1,), 1, (), 0.0, 4).state_dict()
torch.randn_like = lambda x: torch.sin(99 * x.detach()) * 1.4  # a function of the image
torch.randint_like = lambda x, high: (torch.sin(999 * x.detach()) > 0).to(x.dtype)
torch.optim.Adam = lambda weights, lr, fused: torch.optim.SGD(weights, lr)  # linear in gradients
nets, drawn = {}, []
for objective in ("sm", "ssm", "ssm-vr", "dsm"):
    args.out = f"runs{WORLD}/{objective}"
    os.makedirs(args.out, exist_ok=True)
    net = UNet(1, 1, 4, (1,), 1, (), 0.0, 4)
    net.load_state_dict(start)
    def loss_fn(net, rows):  # of this process's part of the data, whatever rows were drawn
        drawn.append(rows.tolist())
        score, x = lambda x: net(x, torch.ones(len(x))), data[RANK::WORLD]
        return sliced_sm.noisy_score_matching(score, x, 0.3, objective).mean()
    sliced_sm.fit(net, loss_fn, [torch.arange(1000)], args, device)
    nets[objective] = net.state_dict()
    assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
torch.save((nets, drawn), f"{WORLD}-{RANK}.pt")
"""


def test_two_processes_are_one_with_the_whole_batch(folder):
    """The averaged gradients of every objective of sliced_sm.py, which differentiate twice, on a
    network whose weights are in channels_last."""
    Path("driver.py").write_text(DRIVER)
    for processes in (1, 2):
        torchrun("driver.py", processes=processes)
    (one, whole), (first, half), (second, other) = (
        torch.load(f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert equal(first, second) and half != other
    assert {*map(len, whole)} == {4} and {*map(len, half)} == {*map(len, other)} == {2}
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)
    for objective in one:
        ours, theirs = (log_lines(f"runs{n}/{objective}") for n in (1, 2))
        assert [line["step"] for line in theirs] == [1, 2]  # written once
        for key in ("grad_norm", "lr"):
            assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-3) and ours[0][key] > 0


def test_torchrun_trains_and_samples(folder):
    script = str(ROOT / "ddpm.py")
    out = torchrun(script, *TINY, *FEWER["ddpm"], "--save-every", "1", "--out", "run")
    assert out.count("step 4 of 4") == 1 and load_state("run")["step"] == 4
    assert len(pictures("run/images")) == 3 and Path("run/samples-2.png").exists()
    words = "--num-samples 10 --sample-batch-size 3 --out"
    use(ddpm, "run", words=f"{words} one")
    torchrun(script, "--checkpoint", "run/checkpoint.pt", *words.split(), "two")
    one = pictures("one")
    assert len(one) == 12 and one == pictures("two")  # samples.png and process.png, too


def test_ddim_tasks_on_the_checkpoint_of_ddpm(take, monkeypatch):
    take("ddpm")
    monkeypatch.setattr(torch, "save", None)  # nothing is kept beside it: it may be read-only
    sample = use(ddim, "ddpm", words="--num-steps 7 --variance analytic --eta 1 --out analytic")
    assert (sample["evaluations"], sample["clip"]) == (7, True)
    table = use(ddim, "ddpm", "reconstruct", "--num-test 3")["table"]
    assert [row["S"] for row in table] == [10, 20] and results("ddpm/reconstruct")["step"] == 4
    assert len(use(ddim, "ddpm", "sweep")["table"]) == 14  # 5 eta and 2 analytic, S = 10, 20 = T


@pytest.mark.parametrize("dequantize", [False, True])
def test_grey_levels_come_back_as_they_were(dequantize):
    """round(255 x) of v / 255, floor(256 x) of (v + u) / 256; with an error of two levels, grey
    level 20 comes back as 20 in the mean."""
    args = SimpleNamespace(dequantize=dequantize)
    levels, off = torch.arange(256, dtype=torch.uint8).expand(9, 256), 2 * torch.randn(100_000)
    for module in (ddpm, ddim, sliced_sm):
        assert torch.equal(module.to_uint8(module.to_float(levels)), levels)
    for process in SDES.values():
        found = sde.to_uint8(args, process, sde.training_images(args, process, levels))
        assert torch.equal(found, levels)
    for level in (20, 235):
        x = (level + 0.5 + off) / 256 if dequantize else (level + off) / 255
        every = [sde.to_uint8(args, SDES["ve"], x), ncsn.to_uint8(args, x),
                 sde.to_uint8(args, SDES["vp"], 2 * x - 1)]
        assert all(abs(found.double().mean() - level) < 0.05 for found in every)


NEW, OLD = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")


def diffusers_state(net, attention=NEW):
    """The weights of net under the names of diffusers, found by counting blocks and levels."""
    places = {"time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2",
              "conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out",
              "mid.0": "mid_block.{}.0", "mid.1": "mid_block.{}.1"}
    for path in ("down", "up"):
        level = i = 0
        for n, module in enumerate(getattr(net, path)):
            places[f"{path}.{n}"], i = f"{path}_blocks.{level}.{{}}.{i}", i + 1
            if not isinstance(module, ResBlock):
                places[f"{path}.{n}"] = f"{path}_blocks.{level}.{path}samplers.0"
                level, i = level + 1, 0
    state = {}
    layers = {".temb": ".time_emb_proj", ".shortcut": ".conv_shortcut", ".norm": ".group_norm",
              ".out": f".{attention[3]}"}
    for name, tensor in net.state_dict().items():
        ours = next(place for place in places if name.startswith(f"{place}."))
        place = places[ours].format("attentions" if ".attention." in name else "resnets")
        layer, kind = name.removeprefix(ours).removeprefix(".attention").rsplit(".", 1)
        thirds = zip(attention, tensor.chunk(3), strict=False)
        state |= ({f"{place}.{part}.{kind}": third.clone() for part, third in thirds}
                  if layer == ".qkv" else {f"{place}{layers.get(layer, layer)}.{kind}": tensor})
    return state


def write_safetensors(path, state, **changes):
    """changes: name -> its entry in the header instead of the right one. Returns the header."""
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in state.items():
        place = [len(data), len(data) + 4 * tensor.numel()]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += tensor.contiguous().numpy().tobytes()
    text = json.dumps(header | changes, sort_keys=True).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return header


@pytest.mark.parametrize("attention", [NEW, OLD])
@pytest.mark.parametrize("settings", [(1, 2, 8, (1, 2, 2), 2, (4,), 0.1, 8), (3, 3, 8, (2,), 1)])
def test_published_weights_load_from_both_formats(tmp_path, settings, attention):
    with torch.device("meta"):
        names = diffusers_state(UNet(), attention).keys()
    assert len(names) == 328  # as UNet2DModel has for CIFAR-10, these among them
    assert {f"up_blocks.2.attentions.2.{layer}.bias" for layer in attention} < names
    net, x = UNet(*settings).eval().requires_grad_(False), torch.randn(2, settings[0], 8, 8)
    for p in net.parameters():
        p.copy_(torch.randn_like(p) / math.sqrt(p[0].numel()))
    state, t = diffusers_state(net, attention), torch.tensor([0, 999])
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    write_safetensors(tmp_path / "reordered.safetensors", dict(reversed(state.items())))
    for path in (tmp_path, tmp_path / "reordered.safetensors"):
        other = UNet(*settings).eval()
        other.load_published(str(path))
        assert torch.equal(net(x, t), other(x, t))


def test_bad_weights_are_refused(folder):
    net, file, pickled = UNet(1, 2, 8, (1, 2), 1), Path("a.safetensors"), Path("a.bin")
    state, before = diffusers_state(net), [p.clone() for p in net.parameters()]
    first, second = "conv_in.bias", "conv_out.bias"  # 8 and 2 numbers
    header = write_safetensors(file, state)
    good, a, b = file.read_bytes(), header[first], header[second]
    nested = struct.pack("<Q", 10**5) + b"[" * 10**5  # JSON that the parser gives up
    fewer = {name: tensor for name, tensor in state.items() if name != first}
    cases = [  # how the file comes about, what is said about it
        *[(lambda x=x: torch.save(x, pickled), match) for x, match in (
            (fewer, "'conv_in.bias' is missing, in the network .8."), ([1], "damaged"),
            (state | {first: torch.zeros(4)}, "'conv_in.bias' is .4., in the network .8."),
            (state | {"mid_block.attentions.0.query.bias": torch.zeros(16)}, "attentions.0"),
            (Hostile(), "damaged"), (state | {first: Hostile()}, "damaged"))],
        *[(lambda x=x: file.write_bytes(x), "damaged") for x in (
            good[:7], good[:99], good[:-4], good + bytes(4), b"\xff" * 8 + good[8:], nested)],
        *[(lambda x=x: write_safetensors(file, state, **{second: x}), "damaged") for x in (
            a, {}, None, b | {"data_offsets": a["data_offsets"]}, b | {"shape": [-1, -2]},
            b | {"dtype": "I32"}, b | {"shape": [-1], "data_offsets": [0, -4]})],
    ]
    for write, match in cases:
        for path in (file, pickled):
            path.unlink(missing_ok=True)
        write()
        with pytest.raises(ValueError, match=match):
            net.load_published(file if file.exists() else pickled)
        assert not Path("executed").exists() and all(map(torch.equal, before, net.parameters()))


CONFIG = dict(attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
              norm_eps=1e-6, block_out_channels=[8, 16])
SCHEDULER = dict(prediction_type="epsilon", beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                 num_train_timesteps=1000)
@pytest.mark.parametrize(("file", "key", "value"), [
    # the file, a wrong value in it, or None: an absent key with the library's default
    *[("config.json", *change) for change in (
        ("attention_head_dim", 8), ("flip_sin_to_cos", True), ("freq_shift", 0),
        ("downsample_padding", 1), ("norm_eps", 1e-5), ("flip_sin_to_cos", None),
        ("freq_shift", None), ("downsample_padding", None), ("norm_eps", None))],
    *[(f"{place}scheduler_config.json", *change) for place in ("", "scheduler/") for change in (
        ("prediction_type", "v_prediction"), ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_start", 1e-3), ("beta_end", 0.012), ("num_train_timesteps", 4000))],
])
def test_weights_of_another_network_or_process_are_refused(folder, monkeypatch, file, key, value):
    net, real = UNet(1, 1, 8, (1, 2), 1, image_size=8), CONFIG if file == "config.json" else {}
    torch.save(diffusers_state(net), "diffusion_pytorch_model.bin")
    Path("scheduler").mkdir()
    monkeypatch.setattr(unet, "UNet", lambda: net)
    Path("config.json").write_text(json.dumps(CONFIG))
    for path in (".", "diffusion_pytorch_model.bin"):
        for right in (SCHEDULER, {}) if "scheduler" in file else (CONFIG,):
            Path(file).write_text(json.dumps(right))
            assert unet.published(path)["settings"]["T"] == 1000
        wrong = {k: x for k, x in (real | {key: value}).items() if k != key or value is not None}
        Path(file).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=key):
            unet.published(path)
    Path(file).write_text(json.dumps(CONFIG | {"attention_head_dim": 16}
                                     | {"block_out_channels": [16, 16]}))  # one head
    assert unet.published(".")["method"] == "ddpm"


def test_scripts_sample_from_published_weights(folder, monkeypatch):
    """From a folder, from a file, and from the hub, for a model of which it has the .bin alone."""
    state, urls = diffusers_state(UNet()), []

    def hub(url, path, *args, **options):
        urls.append(url)
        if not url.endswith(".bin"):
            raise OSError("HTTP Error 404: Not Found")
        torch.save(state, path)

    torch.save(state, "weights.bin")
    torch.save(state | {"conv_out.bias": torch.full((3,), math.nan)}, "nan.bin")
    Path("a").mkdir()
    write_safetensors(Path("a/diffusion_pytorch_model.safetensors"), state)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", hub)
    monkeypatch.setattr(ddpm, "ddpm_sample", lambda model, x_T, *a, callback: model(x_T, x_T))
    monkeypatch.setattr(ddpm, "eps_model", lambda net: lambda x, t: net(x, 0 * t[:, 0, 0, 0]))
    euler = "--predictor euler_maruyama --corrector none --num-steps 21"
    for module, weights, words in ((ddpm, "a", "--channel-mult 1 2 2 2"), (ddpm, "some/model", ""),
                                   (ddim, "weights.bin", "--num-steps 2"),
                                   (sde, "some/model", euler)):
        module.main(f"--weights {weights} --num-samples 1 --device cpu {words}".split())
        out = f"runs/{module.METHOD}-{Path(weights).name}/sample"
        assert [*pictures(f"{out}/images")] == ["000000.png"]
        assert results(out)["arguments"]["dataset"] == "cifar10"
    start = "https://huggingface.co/some/model/resolve/main"
    model = [f"{start}/diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    assert {*urls} >= {f"{start}/config.json", *model} and len(urls) == len({*urls})  # once
    assert pictures("runs/ddpm-a") == pictures("runs/ddpm-model")
    offline = Mock(side_effect=OSError("<urlopen error [Errno -3] name resolution>"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for words, match in (("nobody/nothing", "cannot download .*: put it into .*nothing"),
                         ("a --resume", "not allowed with"), ("b.bin", "missing"),
                         ("nan.bin --num-samples 1 --device cpu", "not finite"),
                         ("a --channels 8", "--channels: the checkpoint has 128")):
        refused(match, f"--weights {words}", tiny=False)
    refused("--sde: the checkpoint has vp", "--weights a --sde ve", sde, tiny=False)
    assert not pictures("runs/ddpm-nan.bin")


def test_levels_and_their_losses_are_measured(take, monkeypatch):
    run("--out new --levels 0 --steps 1", ncsn)
    new = results("new", "arguments")
    assert new["sigma_max"] == pytest.approx(7.386, abs=0.01)
    assert new["levels"] == ncsn.scales_technique2(new["sigma_max"], 0.01, 256)
    run("--out ve --sde ve --steps 1", sde)
    assert results("ve", "arguments")["sigma_max"] == new["sigma_max"]
    run("--out old --settings 2019 --steps 1", ncsn)
    old = load_state("old")
    assert equal(old["model"], old["ema"]) and old["settings"]["dequantize"]  # 2019: no EMA
    take("sliced_sm")
    monkeypatch.setattr(UNet, "forward", lambda net, x, t: t.view(-1, 1, 1, 1) + 0 * x)
    losses = use(sliced_sm, "sliced_sm", "test", "--out known --num-test 20")["dsm_loss"]
    assert losses == pytest.approx([0.5, 1, 2.5, 5], rel=0.1)  # (1 + (sigma s)^2) / 2, sigma s = i


@pytest.mark.parametrize("transition", ["uniform", "absorbing"])
def test_d3pm_of_a_text(folder, transition):
    run(f"--dataset book.txt --out run --save-every 1 --transition {transition}", d3pm)
    assert files_of("run") == {
        "checkpoint.pt", "log.jsonl", "process.txt", "results.json", "samples.txt"}
    texts = Path("run/samples.txt").read_text().split("\n\n")
    assert len(texts) == 3 and all(re.fullmatch("[a-z ]{16}", t) for t in texts[:2])
    assert 4 < results("run", "bpd")["bits_per_char"]["L_0"] < 5.5
    process = Path("run/process.txt").read_text().splitlines()
    assert len(process) == 16 and process[-1] == f"    0  {texts[0]}"
    for words, match in (("--width 16", "--width: the checkpoint has 8"),
                         ("--dataset digits", "checkpoint is of text")):
        refused(match, f"--checkpoint run/checkpoint.pt {words}", d3pm)
    if transition == "absorbing":
        assert process[0] == f"   20  {16 * '_'}"
        use(d3pm, "run", "infill")
        parts = Path("run/infill/infill.txt").read_text()[:-1].split("\n\n")
        assert len(parts) == 6  # two masks of three texts
        for given, *texts in (part.split("\n") for part in parts):
            assert "_" in given and len(texts) == 4  # three completions and the original
            assert all(re.fullmatch(given.replace("_", "."), text) for text in texts)
    shutil.move("book.txt", "other.txt")  # samples need no text
    use(d3pm, "run")
    assert Path("run/sample/samples.txt").read_text() == Path("run/samples.txt").read_text()
    assert use(d3pm, "run", "bpd", "--dataset other.txt")["n"] == 3


def test_texts_are_folded_split_and_downloaded_once(folder, monkeypatch):
    Path("short.txt").write_text("Ab\n9z " + "q" * 5000 + "xyz!")
    train, test = d3pm.load_text(parse(d3pm, "--dataset", "short.txt", "--length", "10"))
    assert train.dtype == torch.uint8 and train[:5].tolist() == [0, 1, 26, 25, 26]
    assert test[-4:].tolist() == [23, 24, 25, 26] and d3pm.to_text(train[:5]) == "ab z "
    n = 5 + 5000 + 4
    assert len(train) == n * 9 // 10 and len(test) == n - n * 19 // 20
    Path("german.txt").write_text("M\u00fc\u00dften \ufb01xe N\u00e4gel; " * 40, "utf-8-sig")
    train, _ = d3pm.load_text(parse(d3pm, "--dataset", "german.txt", "--length", "10"))
    assert d3pm.to_text(train)[:19] == "mussten fixe nagel "
    with zipfile.ZipFile("elsewhere.zip", "w") as archive:
        archive.writestr("text8", "the quick brown fox " * 100)
    download = Mock(side_effect=lambda url, path: (shutil.copy("elsewhere.zip", path), None))
    monkeypatch.setattr(d3pm.urllib.request, "urlretrieve", download)
    args = parse(d3pm, *"--dataset text8 --length 10".split())
    assert equal(d3pm.load_text(args), d3pm.load_text(args)) and files_of("data") == {"text8.zip"}
    assert [x.args[0] for x in download.call_args_list] == ["http://mattmahoney.net/dc/text8.zip"]
    Path("data/text8.zip").write_bytes(b"half a zip")
    with pytest.raises(ValueError, match="data/text8.zip .*not a zip file"):
        d3pm.load_text(args)


def test_tasks_of_sde(take):
    take("sde")
    assert results("sde", "sample")["evaluations"] == 13 and results("sde", "bpd")["t_min"] == 1e-5
    table = use(sde, "sde", "samplers")["table"]
    assert len(table) == 15  # 5 predictors x 3 correctors without the empty pair, and the ODE
    assert {row["evaluations"] for row in table[:-1]} == {7, 13}
    chain = sde.chain(parse(sde, *"--task inpaint --snr 0.3 --control-snr 0.2".split()))
    assert chain["snr"] == 0.2
    drawn = use(sde, "sde", "class", "--num-samples 11 --sample-batch-size 9")
    assert drawn["n"] == len(pictures("sde/class/images")) == 11
    assert Image.open("sde/class/samples.png").size == (10 * 50 + 2, 2 * 50 + 2)  # a class a column


def test_classifiers_are_taken_completed_and_not_mixed_up(folder):
    photos = "--dataset photos --image-size 8 --attention-resolutions --out"
    run(f"{photos} run", sde)
    for steps, words in ((3, "--out half"), (5, "--out whole"),
                         (5, "--classifier half.pt --out rest"),
                         (5, "--classifier whole/classifier.pt --out other")):
        found = use(sde, "run", "class", f"--num-samples 2 --classifier-steps {steps} {words}")
        assert found["classifier_steps"] == steps
        half = load_state("half/classifier.pt")  # as if interrupted at step 3 of 5
        torch.save(half | {"settings": half["settings"] | {"steps": 5}}, "half.pt")
    assert equal(weights_of("rest/classifier.pt"), weights_of("whole/classifier.pt"))
    assert not Path("other/classifier.pt").exists()
    assert pictures("whole") == pictures("rest") == pictures("other")
    run(f"--sde subvp {photos} subvp", sde)
    save("photos/stray.png", 0)
    task, other = (f"{out}/checkpoint.pt --task class" for out in ("run", "subvp"))
    for words, match in (
        ("whole/classifier.pt", "not one of sde or ddpm: it is a checkpoint of sde's classifier"),
        (f"{task} --classifier run/checkpoint.pt", "classifier: it is a checkpoint of sde"),
        (f"{other} --classifier whole/classifier.pt", "trained with another sde"),
        (task, "photos: each image must be in the folder of its class"),
    ):
        refused(match, f"--checkpoint {words} --out x", sde, tiny=False)


# ---- 4. The house --------------------------------------------------------------------------------

PER_PAPER = {
    "METHOD", "FIXED", "READS", "SETTINGS", "PRESETS", "MNIST", "TASKS", "preset", "check",
    "loss", "to_float", "to_uint8", "draw", "preview", "sample", "bpd", "interpolate",
    "inpainting", "toy", "main", "bits_per_dim", "inpaint",
}
PLUMBING = {
    "seed_all", "parse_flags", "read_args", "setup", "load_folder", "load_images",
    "load_checkpoint", "fit", "batches", "keep", "save_grid", "save_images", "do_tasks",
}
BANNERS = ["# ---- The method -", "# ---- The run -", "# ---- Plumbing: "]


def parts(name):
    """The docstring, and the text under each of the three banners."""
    text = (ROOT / f"{name}.py").read_text()
    places = [text.index(banner) for banner in BANNERS]
    assert [text.count(banner) for banner in BANNERS] == [1, 1, 1] and places == sorted(places)
    method, run, plumbing = (text[a:b] for a, b in zip(places, [*places[1:], None], strict=True))
    return ast.get_docstring(ast.parse(text)), method, run, plumbing


def definitions(name):
    """Top-level names of a script with their exact text."""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
    return found


def test_plumbing_is_identical_and_complete():
    assert {path.stem for path in ROOT.glob("*.py")} == {"unet", "test_all", *SCRIPTS}
    assert len({parts(name)[3] for name in SCRIPTS}) == 1
    first = {}
    for name in SCRIPTS:
        found = definitions(name)
        assert PLUMBING <= found.keys(), PLUMBING - found.keys()
        for key in found.keys() - PER_PAPER:
            assert found[key] == first.setdefault(key, found[key]), f"{name} has another {key}"


@pytest.mark.parametrize("name", [*SCRIPTS, "unet"])
def test_imports_and_that_the_method_needs_torch_alone(name):
    """Cut out, it runs under nothing but torch and the standard library."""
    text = (ROOT / f"{name}.py").read_text()
    assert max(map(len, text.splitlines())) <= 100
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    allowed = {"torch", "torchvision", "numpy", "PIL"} | ({"unet"} if name != "unet" else set())
    assert modules - allowed <= sys.stdlib_module_names
    method = parts(name)[1] if name in SCRIPTS else ""
    known = {"math": math, "torch": torch, "F": F, "pairwise": pairwise}
    exec(compile(method, f"{name}.py", "exec"), known)  # decorators run, too
    nodes = list(ast.walk(ast.parse(method)))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    local |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    unknown = {node.id for node in names} - known.keys() - local - set(dir(builtins))
    assert not unknown


def numbers(text, kinds=("Eq", "Alg", "Fig", "Table", "Technique")):
    """What a text cites: ("Eq", 7) of Eq. (7)."""
    text, found = re.sub(r"\s+", " ", text), set()
    for kind in kinds:
        for cited in re.findall(rf"{kind}\.? (\(?\d+\)?(?: \(L\))?(?:, \(?\d+\)?)*)", text):
            found |= {(kind, int(n)) for n in re.findall(r"\d+", cited)}
    return found


@pytest.mark.parametrize(("name", "papers"), [
    ("ddpm", "DDPM"), ("ddim", "DDIM"), ("ncsn", "NCSN"), ("sde", "Score-SDE"),
    ("sliced_sm", "SSM|NCSN"), ("d3pm", "D3PM|Multinomial"),
])
def test_every_equation_has_a_test_that_names_it(name, papers):
    """The docstring lists those of the method, and for each of them a test names it."""
    docstring, method, _, _ = parts(name)
    listed = re.search(r"Implements.*?\.\n\n", docstring, re.S).group()
    if name != "ddpm":  # what it takes over from DDPM has DDPM's numbers
        method = method.replace(definitions(name).get("Schedule", "no such class"), "")
    assert numbers(listed) == numbers(method)
    before_the_first = re.split(r"Eq\. \(\d+\)[,:]|# .*Eq\.|# SSM,", method)[0]
    before_the_method = (ROOT / f"{name}.py").read_text().split(BANNERS[0])[0]
    assert (before_the_method + before_the_first).count("\n") < 75
    assert 20 <= len(docstring.splitlines()) <= 30
    text = Path(__file__).read_text().split("# ---- 3.")[0]
    cited = re.findall(rf"(?:{papers}) ((?:Eq|Alg)\. \(?\d+\)?(?:,\s+\(?\d+\)?)*)", text)
    missing = numbers(listed, ("Eq", "Alg")) - numbers("; ".join(cited))
    assert not missing


def commands(text):
    """Every `python script.py ...` of a text, without its trailing comment."""
    for line in re.findall(r"^\s*(?:\$ )?(?:.*&& )?python (\w+\.py[^\n]*)", text, re.M):
        script, *words = shlex.split(re.split(r"\s{3,}|\s+#", line)[0])
        yield script.removesuffix(".py"), words


def test_every_documented_command_parses(monkeypatch):
    texts = [(ROOT / "README.md").read_text(), *(parts(name)[0] for name in SCRIPTS)]
    found, outs = [command for text in texts for command in commands(text)], {}
    readme = len([*commands(texts[0])])
    assert readme >= 40
    for n, (name, words) in enumerate(found):
        module, method = SCRIPTS[name], "ddpm" if "ddpm" in " ".join(words) else name
        settings = vars(parse(SCRIPTS[method]))
        settings |= {"image_channels": 3 if "colorize" in words else 1}
        loaded = {"method": method, "settings": settings, "step": 1}
        monkeypatch.setattr(module, "load_checkpoint", lambda *_, loaded=loaded: loaded)
        monkeypatch.setattr(module, "published", lambda _, loaded=loaded: loaded)
        if not {"FILE", "path/to/photos", "--help"} & {*words}:
            out = parse(module, *words).out
            if "--resume" not in words:  # README's can all be run, one after the other
                assert n >= readme or outs.setdefault(out, (name, words)) == (name, words)


def test_readme_tells_the_truth_about_the_code():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert block == inspect.getsource(ddpm.ddpm_loss)
    for name, module in {**SCRIPTS, "unet": unet}.items():
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        method = parts(name)[1].count("\n") if name in SCRIPTS else len(lines)
        row = re.search(rf"^\| `{name}\.py` \|.*\| (\d+) \| ([\d,]+) \|$", text, re.M)
        assert int(row[1]) == method and int(row[2].replace(",", "")) == len(lines), name
        guide = re.search(rf"^\*\*{name}\.py\*\*.*?(?=^$|\Z)", text, re.M | re.S).group()
        for listed in re.findall(r"`(\w+)`", guide):
            owners = {"d3pm": [d3pm.CategoricalDiffusion], "unet": [UNet]}.get(name, [])
            assert any(hasattr(x, listed) for x in [module, *owners]), f"{name}.py has no {listed}"
    outside = re.sub(r"<details>.*?</details>|```.*?```", "", text, flags=re.S)
    assert len(outside.split()) <= 1600
    pictures = re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", text)
    assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("name", SCRIPTS)
def test_presets_have_flags_and_help_prints_them(name, capsys):
    module = SCRIPTS[name]
    for dataset in {"digits", "mnist", "cifar10", "fashion_mnist", *module.PRESETS} - {"text"}:
        args = parse(module, "--dataset", dataset)
        preset = module.preset(args)
        assert {key: getattr(args, key) for key in preset} == preset
        assert preset.keys() <= module.SETTINGS.keys() | {"lr_decay", "preview"}
        assert args.flip == (dataset == "cifar10")
        if name == "ddim":  # it trains as ddpm does
            theirs, ours = vars(parse(ddpm, "--dataset", dataset)), vars(args)
            keys = theirs.keys() & ours.keys() - {"num_test", "clip", "variance", "out"}
            assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    for script, words, expected in (  # which depend on others
        ("d3pm", "text8 --transition auto", {"transition": "absorbing", "hybrid": 0.01}),
        ("d3pm", "text8 --method multinomial", {"transition": "uniform", "width": 512}),
        ("sde", "cifar10 --sde ve --network auto", {"network": "ncsn++", "num_res_blocks": 4}),
        ("sde", "cifar10 --deep", {"network": "ddpm++", "num_res_blocks": 8}),
    ):
        if script == name:
            args = vars(parse(module, "--dataset", *words.split()))
            assert expected == {key: args[key] for key in expected}
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for key in module.SETTINGS.keys() | {"out", "checkpoint", "resume", "task", "preview"}:
        assert f"--{key.replace('_', '-')}" in text


def readme_block(part):
    """The Python block of the README that contains this text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if part in block)


@pytest.mark.parametrize(("size", "mult", "steps"), [((8, 4), "1, 2", 3), ((1, 2), "1", 400)])
def test_the_loop_of_the_readme_trains_and_samples(size, mult, steps):
    """As printed, but smaller; two Gaussian pixels get their mean."""
    text, mean = readme_block("import Schedule, ddpm_loss"), torch.tensor([0.4, -0.3])
    given = torch.rand(20, 1, *size) * 2 - 1
    if size == (1, 2):
        given = mean + 0.2 * torch.randn(5000, 1, *size)
    for printed, smaller in (
        ("torch.rand(512, 1, 16, 16) * 2 - 1", "given"), ("(1, 2, 4)", f"({mult},)"),
        ("image_size=16", f"image_size={max(size)}"), ("range(1, 2001)", f"range(1, {steps + 1})"),
        ("T=250, beta_1=0.008, beta_T=0.04", "T=25, beta_1=0.04, beta_T=0.4"),
        ("torch.randn(16, 1, 16, 16)", f"torch.randn(200, 1, {size[0]}, {size[1]})"),
    ):
        assert text.count(printed) == 1, printed
        text = text.replace(printed, smaller)
    known = {"given": given}
    exec(compile(text, "README.md", "exec"), known)
    x = known["samples"]
    assert x.shape == (200, 1, *size) and x.abs().max() <= 1
    if size == (1, 2):
        torch.testing.assert_close(x.mean((0, 1, 2)), mean, rtol=0, atol=0.06)


def test_the_readme_draws_a_loss_curve(folder):
    Path("runs/ddpm-digits").mkdir(parents=True)
    lines = [json.dumps({"step": k, "loss": 1 / k}) for k in range(1, 9)]
    Path("runs/ddpm-digits/log.jsonl").write_text("\n".join(lines))
    exec(compile(readme_block("log.jsonl"), "README.md", "exec"), {})
    assert (np.array(Image.open("loss.png")) < 255).any(0).mean() > 0.5
