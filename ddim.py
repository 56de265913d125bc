"""Denoising Diffusion Implicit Models (Song, Meng, Ermon 2021, arXiv:2010.02502).

Implements: Eq. (4), (5), (9), (12), (13), (16); Table 1, 2; Fig. 5, 6; and the optimal noise of
Analytic-DPM (Bao, Li, Zhu, Zhang 2022, arXiv:2201.06503), Theorems 1 and 2.

    t, s            a step goes from t to s; in sampling s < t     ints in 0..T; 0 is the data
    tau             the steps that a sampler visits                S ascending ints, the last T
    x_0, x_t        data, and data after t steps of noise          (B, C, H, W), x_0 in [-1, 1]
    alpha_bar       the paper's alpha: DDPM's product of 1 - beta  (T + 1,), alpha_bar[0] = 1
    sigma, eta      noise of a step; eta: 0 is DDIM, 1 is DDPM     eta in [0, 1]
    model(x_t, t)   the network eps_theta                         t (B,) int64; like x_t

    python ddim.py                                                train, 20-step samples
    python ddim.py --checkpoint runs/ddpm-digits/checkpoint.pt    use what ddpm.py trained
    python ddim.py --checkpoint runs/ddpm-digits/checkpoint.pt --task sweep    or reconstruct,
                                                                                  interpolate

README.md has measured results. Deviations from the paper and the released code:
1. tau has S distinct steps and ends at T; the released lists have other counts, repeat steps and
   end between 0.8 T and 0.99 T. Encoding starts with eps at t = 1: there is no eps(x_0, 0).
2. Training is DDPM's, whose weights gave the published CIFAR-10 numbers: means over dimensions,
   warmup, gradient clipping, independent t; EMA decay min(decay, (1 + n) / (10 + n)).
3. The sigma-hat row of Table 1 clips x_0_hat to [-1, 1], as released; the other rows do not.
4. Analytic-DPM: eps is derived again from the clipped x_0_hat (released: eps is kept), and the last
   noise is always limited to two pixel levels (released: to one or two).
"""

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from unet import UNet, published

# ---- The method ----------------------------------------------------------------------------------


class Schedule:
    """Variances beta_1 ... beta_T, linear in t, of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1},
    beta_t I), and their products. Numbers are those of Ho et al. 2020.
    beta, alpha, alpha_bar, beta_tilde: (T + 1,) float64, indexed by the paper's t; entry 0 is the
    data: 0, 1, 1, 0. ValueError unless T >= 2, 0 < beta_1 <= beta_T < 1 and alpha_bar[T] > 1e-70.
    """

    def __init__(self, T=1000, beta_1=1e-4, beta_T=0.02):
        if T < 2 or not 0 < beta_1 <= beta_T < 1:
            raise ValueError(f"need T >= 2, 0 < beta_1 <= beta_T < 1, not {T}, {beta_1}, {beta_T}")
        self.T = T
        self.beta = torch.zeros(T + 1, dtype=torch.float64)
        self.beta[1:] = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)  # Eq. (2), Sec. 4
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)  # Eq. (4)
        if self.alpha_bar[-1] < 1e-70:  # float32 cannot divide by its square root
            raise ValueError(f"alpha_bar_T is {self.alpha_bar[-1]:.0e}: lower T or beta_T")
        self.beta_tilde = self.beta.clone()  # at 0: 0
        self.beta_tilde[1:] *= (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])  # Eq. (7)

    def to(self, device):
        """Move the tables, in place like a module (float32 on mps, which has no float64)."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name in ("beta", "alpha", "alpha_bar", "beta_tilde"):
            setattr(self, name, getattr(self, name).to(device, dtype))
        return self


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def q_sample(x_0, t, eps, schedule):
    """x_t ~ q(x_t | x_0), like x_0; t (B,) in 1..T, or 0 for x_0 itself; eps ~ N(0, I)."""
    signal, std = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
    return expand(signal, x_0) * x_0 + expand(std, x_0) * eps  # Eq. (4)


def eps_model(net):
    """model(x_t, t), t in 1..T, of a network that counts from 0, as the released ones do."""
    return lambda x_t, t: net(x_t, t - 1)


def ddim_loss(model, x_0, schedule):
    """Scalar: mean over the batch and all dimensions; x_0 in [-1, 1].
    It depends only on the marginals q(x_t | x_0), which the processes of all sigma share: one
    network serves them all, and DDPM's will do (Theorem 1)."""
    t = torch.randint(1, schedule.T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    error = (model(q_sample(x_0, t, eps, schedule), t) - eps).square()
    return error.mean()  # Eq. (5) with gamma = 1


def timesteps(T, S, spacing="linear"):
    """tau: S distinct ascending ints of 1..T, the last T (Sec. 4.2, App. D.2). ValueError if S > T.
    "linear": T i / S; "quadratic": T (i / S)^2, but at least i; rounded down, for i = 1..S."""
    if not 1 <= S <= T:
        raise ValueError(f"{S} steps are not within 1..{T}")
    if spacing == "linear":
        return [T * i // S for i in range(1, S + 1)]
    if spacing == "quadratic":
        return [max(i, T * i * i // S**2) for i in range(1, S + 1)]
    raise ValueError(f"spacing is {spacing!r}, not 'linear' or 'quadratic'")


def sigma_tensor(t, s, eta, schedule):
    """ddim_sigma as a 0-dimensional tensor on the schedule's device."""
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    return eta * variance.sqrt()  # Eq. (16)


def ddim_sigma(t, s, eta, schedule):
    """The standard deviation of the step from t to s < t, a float; 0 at s = 0, the data."""
    return float(sigma_tensor(t, s, eta, schedule))


def ddim_step(x_t, eps, t, s, schedule, eta=0.0, noise=None, clip=False):
    """x_s, like x_t, with eps = model(x_t, t); ints t and s. ValueError unless eta is in [0, 1].
    noise ~ N(0, I) is drawn if None. clip: x_0_hat to [-1, 1], and eps derived again from it. With
    eta = 0, and only then, s > t makes the same step towards the noise."""
    if not 0 <= eta <= 1 or (eta > 0 and s > t):
        raise ValueError(f"eta is {eta} from t = {t} to {s}: it must be in [0, 1], 0 if s > t")
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    signal, std = alpha_bar_t.sqrt().to(x_t.dtype), (1 - alpha_bar_t).sqrt().to(x_t.dtype)
    x_0_hat = (x_t - std * eps) / signal  # Eq. (9)
    if clip:
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps = (x_t - signal * x_0_hat) / std  # Eq. (9) solved for eps
    sigma = sigma_tensor(t, s, eta, schedule) if eta > 0 else torch.zeros_like(alpha_bar_t)
    direction = (1 - alpha_bar_s - sigma**2).clamp(min=0).sqrt().to(x_t.dtype)
    mean = alpha_bar_s.sqrt().to(x_t.dtype) * x_0_hat + direction * eps  # Eq. (12)
    if eta == 0:
        return mean
    noise = torch.randn_like(x_t) if noise is None else noise
    return mean + sigma.to(x_t.dtype) * noise  # Eq. (12)


def record_steps(T):
    """At most 15 evenly spaced steps of 1..T, ascending: a sampler records its states there."""
    return sorted({math.ceil(T * k / 15) for k in range(1, 16)})


@torch.no_grad()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, clip=False, sigma_hat=False, record=None,
                gamma=None):
    """x_T ~ N(0, I) -> x_0, like x_T, in len(tau) evaluations of the model; tau from `timesteps`.

    eta (Table 1): 0 is DDIM, deterministic (Fig. 5); 1 is DDPM's sampler, with exactly its small
    variance if tau = 1..T.
    sigma_hat: the mean of eta = 1 with the noise of DDPM's larger variance (App. D.3).
    gamma: of analytic_gamma; the mean of eta, noise of analytic_sigmas. ValueError with sigma_hat.
    record: a list that gets x_t at 15 of tau's steps, from T down (all, if fewer), and x_0."""
    if sigma_hat and gamma is not None:
        raise ValueError("sigma_hat and gamma are two choices of the noise: take one of them")
    x_t, recorded, sigmas = x_T, () if record is None else record_steps(len(tau)), None
    if sigma_hat:
        alpha_bar = schedule.alpha_bar[tau]
        eta, sigmas = 1.0, [0.0, *(1 - alpha_bar[1:] / alpha_bar[:-1]).sqrt()]  # App. D.3
    elif gamma is not None:
        sigmas = analytic_sigmas(tau, gamma, schedule, eta, clip)
    for i in range(len(tau), 0, -1):
        t, s = tau[i - 1], tau[i - 2] if i > 1 else 0
        if i in recorded:
            record.append(x_t)
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        no_noise = torch.zeros_like(x_t) if sigmas else None  # it has its own, below
        x_t = ddim_step(x_t, eps, t, s, schedule, eta, no_noise, clip)
        if sigmas and s > 0:
            x_t = x_t + sigmas[i - 1] * torch.randn_like(x_t)
    if record is not None:
        record.append(x_t)
    return x_t


@torch.no_grad()
def ddim_encode(model, x_0, schedule, tau):
    """x_0 -> x_T, like x_0: the ODE that DDIM discretises, integrated upwards (Sec. 4.3).
    Each Euler step from s to the next t of tau takes eps at its start, (x_s, s), but gives the
    model 1 for s = 0. len(tau) evaluations; ddim_sample with eta = 0 decodes (Table 2)."""
    x_s, s = x_0, 0
    for t in tau:
        eps = model(x_s, torch.full((len(x_s),), max(s, 1), device=x_s.device))
        x_s, s = ddim_step(x_s, eps, s, t, schedule), t  # sqrt(alpha_bar_t) times Eq. (13)
    return x_s


def slerp(z_0, z_1, fraction):
    """Spherical interpolation, like z_0: z_0 at fraction 0, z_1 at 1 (App. D.5).
    Each image has its own angle, over all dimensions; at 0 or pi the mixing is linear. Fig. 6."""
    a, b = z_0.flatten(1), z_1.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = cosine.clamp(-1, 1).arccos()[:, None]  # (B, 1)
    linear = theta.sin() < 1e-4
    sine = torch.where(linear, torch.ones_like(theta), theta.sin())
    of_a = torch.where(linear, 1 - fraction, ((1 - fraction) * theta).sin() / sine)
    of_b = torch.where(linear, fraction, (fraction * theta).sin() / sine)
    return (of_a * a + of_b * b).view_as(z_0)  # App. D.5


# Analytic-DPM. The step of Eq. (12) has the right mean for an exact eps, but too little noise: it
# leaves out that x_0 is uncertain given x_t. What is missing follows from the mean square of eps.


@torch.no_grad()
def analytic_gamma(model, x_0, schedule):
    """(T + 1,) float64 on the CPU: at t the mean of |eps|^2 / d over x_0 (N, ...), with one x_t for
    each x_0; 0 at t = 0. The paper finds N = 10 enough; its Gamma is this over 1 - alpha_bar_t.
    1 - gamma is the variance of the noise given x_t, so an estimate above 1 becomes 1."""
    gamma = [x_0.new_zeros(())]
    for step in range(1, schedule.T + 1):
        t = torch.full((len(x_0),), step, device=x_0.device)
        eps = model(q_sample(x_0, t, torch.randn_like(x_0), schedule), t)
        gamma.append(eps.square().mean())  # Sec. 3, the estimate of Gamma
    return torch.stack(gamma).cpu().double().clamp(max=1)


def analytic_sigma(t, s, gamma, schedule, eta=0.0, clip=True):
    """The optimal standard deviation of the step from t to s < t, whose mean is Eq. (12) with eta:
    a float. clip: the data are in [-1, 1], so x_0 given x_t has a variance of at most 1."""
    alpha_bar_t, alpha_bar_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s])
    variance = ddim_sigma(t, s, eta, schedule) ** 2  # the paper's lambda^2
    direction = math.sqrt(max(1 - alpha_bar_s - variance, 0))
    missing = max(1 - float(gamma[t]), 0)  # Var[eps | x_t]
    if clip:  # Var[x_0 | x_t] = (1 - alpha_bar_t) / alpha_bar_t Var[eps | x_t]
        missing = min(missing, alpha_bar_t / (1 - alpha_bar_t))  # Theorem 2
    factor = math.sqrt((1 - alpha_bar_t) * alpha_bar_s / alpha_bar_t) - direction
    # lambda^2 + (sqrt(beta_bar_t / alpha) - sqrt(beta_bar_s - lambda^2))^2 (1 - beta_bar_t Gamma)
    return math.sqrt(variance + factor**2 * missing)  # Theorem 1


def analytic_sigmas(tau, gamma, schedule, eta=0.0, clip=True):
    """analytic_sigma of every step of tau, a list: [i] is that of the step from tau[i].
    As released, the last step adds no noise and, with clip, the one before it adds a noise whose
    mean absolute value is at most two pixel levels of 2 / 255."""
    steps = zip(tau[1:], tau[:-1], strict=True)
    sigmas = [0.0, *(analytic_sigma(t, s, gamma, schedule, eta, clip) for t, s in steps)]
    if clip and len(tau) > 1:
        sigmas[1] = min(sigmas[1], 2 * 2 / 255 * math.sqrt(math.pi / 2))  # E|z| = sqrt(2 / pi)
    return sigmas


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # CIFAR-10, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,  # DDPM, App. B
    num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=(32, 32),  # App. B
    channels=128, channel_mult=(1, 2, 2, 2), warmup=5000, grad_clip=1.0,  # DDPM's code
    lr_decay=0.0, num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
    T=(1000, "steps of the process (Sec. 5)"),
    beta_1=(1e-4, "first variance (DDPM, Sec. 4)"), beta_T=(0.02, "last variance (DDPM, Sec. 4)"),
    num_steps=(100, "S, network evaluations of a sample (Table 1)"),
    spacing=(("quadratic", "linear"), "of the steps that are visited (App. D.2)"),
    eta=(0.0, "0: DDIM, 1: DDPM (Eq. 16)"),
    sigma_hat=(False, "DDPM's larger noise instead of eta (App. D.3)"),
    variance=(("eta", "analytic"), "noise of a step: by --eta, or the optimal one (Analytic-DPM)"),
    clip=(False, "clip x_0_hat to [-1, 1]; --sigma-hat and analytic always do (released code)"),
    weights=("", "published weights: google/ddpm-ema-cifar10-32, or diffusers' file or folder"),
    num_test=(64, "test images to reconstruct"),
)
MNIST = dict(
    image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
    steps=50_000, flip=False, warmup=1000, spacing="linear", num_steps=50,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "mnist": MNIST, "fashion_mnist": MNIST,
    "folder": dict(flip=False, spacing="linear"),  # App. D.2
    # Not in the paper: trains in minutes on a laptop. The betas sum to 6, not to 10, as less
    # noise hides an image of 16x16 pixels.
    "digits": dict(
        T=250, beta_1=0.008, beta_T=0.04, spacing="linear", num_steps=20, image_size=(16, 16),
        channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(),
        dropout=0.0, lr=1.2e-2, steps=2200, flip=False, warmup=900, lr_decay=3.0, num_samples=64,
        num_test=16, save_every=500,
    ),
}


def preset(args):
    return PRESETS.get(args.dataset, PRESETS["folder"])


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def latents(run, n):
    return torch.randn(n, run.image_channels, *run.image_size, device=run.device)


def optimal_gamma(run):
    """analytic_gamma of 256 training images, kept beside the checkpoint as gamma.pt."""
    beside = run.checkpoint and not run.weights  # published weights lie in no run folder
    folder = Path(run.checkpoint).parent if beside else run.out
    step, path = run.arguments["step"], folder / "gamma.pt"
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("step", -1) != step:
        few = torch.randperm(len(run.data[0]))[:256].to(run.data[0].device)
        model, x_0 = eps_model(run.net), to_float(run.data[0][few].to(run.device))  # in float32
        saved = {"step": step, "gamma": analytic_gamma(model, x_0, run.schedule)}
        if RANK == 0:
            save_checkpoint(path, saved)
    return saved["gamma"]


def sample(run):
    """Samples; process.png: q(x_t | x_0) of a test image, then x_t of eight samples."""
    analytic = run.variance == "analytic"
    options = {"eta": run.eta, "clip": run.clip or run.sigma_hat or analytic}
    options |= {"sigma_hat": run.sigma_hat, "gamma": optimal_gamma(run) if analytic else None}

    def draw(first, n, record):
        x_T = latents(run, n)
        x_0 = ddim_sample(run.model, x_T, run.schedule, run.tau, **options, record=record)
        return to_uint8(x_0)

    images, record = save_images(draw, run)
    save_grid(images, run.out / "samples.png", columns=10)
    if record:
        rows = list(torch.stack(record, dim=1)[:8])  # (S + 1 or 16, C, H, W) each
        if run.test is not None:
            x_0 = to_float(run.test[:1]).expand(len(record), -1, -1, -1)
            t = torch.tensor([0, *run.tau])[[0, *record_steps(len(run.tau))]].to(run.device)
            rows.insert(0, q_sample(x_0, t, torch.randn_like(x_0), run.schedule))
        save_grid(to_uint8(torch.cat(rows)), run.out / "process.png", columns=len(record))
    return {"n": run.num_samples, "evaluations": len(run.tau), "spacing": run.spacing,
            "eta": "sigma-hat" if run.sigma_hat else run.eta, "clip": options["clip"],
            "variance": run.variance}


def sweep(run):
    """Table 1 and Fig. 5 as pictures: one x_T for every eta and number of steps; Analytic-DPM."""
    x_T, rows, table, gamma = latents(run, 10), [], [], optimal_gamma(run)
    run.model(x_T, torch.ones(len(x_T), device=run.device))  # the first call is slower
    options = {str(eta): dict(eta=eta, clip=run.clip) for eta in (0.0, 0.2, 0.5, 1.0)}
    options["sigma-hat"] = dict(eta=1.0, clip=True, sigma_hat=True)
    for eta in (0.0, 1.0):
        options[f"{eta}, analytic"] = dict(eta=eta, clip=True, gamma=gamma)
    for eta in options:
        for S in sorted({min(S, run.T) for S in (10, 20, 50, 100, 1000)}):
            tau, start = timesteps(run.T, S, run.spacing), time.time()
            seed_all(run.seed, "noise")  # the same in each row
            x_0 = ddim_sample(run.model, x_T, run.schedule, tau, **options[eta])
            rows.append(to_uint8(x_0).cpu())  # waits for the GPU
            table.append({"eta": eta, "S": S, "seconds": round(time.time() - start, 2)})
            print("eta {eta}: {S} evaluations, {seconds} s".format(**table[-1]))
    labels = ["eta {eta}, {S} evaluations".format(**row) for row in table]
    save_grid(torch.cat(rows), run.out / "sweep.png", columns=10, labels=labels)
    return {"n": len(x_T), "spacing": run.spacing, "clip": run.clip, "table": table}


def reconstruct(run):
    """Table 2: encode test images and decode them with the same steps."""
    run.bf16, x_0, table = False, to_float(run.test[: run.num_test]), []
    rows = [to_uint8(x_0[:10])]
    for S in sorted({min(S, run.T) for S in (10, 20, 50, 100, 200, 500, 1000)}):
        tau, decoded = timesteps(run.T, S, run.spacing), []
        for x in x_0.split(run.sample_batch_size):
            x_T = ddim_encode(run.model, x, run.schedule, tau)
            decoded.append(ddim_sample(run.model, x_T, run.schedule, tau))
        error = ((torch.cat(decoded) - x_0) / 2).square().flatten(1).mean(1)  # data in [0, 1]
        table.append({"S": S, "mse": error.mean().item(),
                      "standard_error": error.std().item() / math.sqrt(len(error))})
        print("S = {S}: {mse:.6f} +- {standard_error:.6f}".format(**table[-1]))
        rows.append(to_uint8(decoded[0][:10]))
    labels = ["originals", *(f"S = {row['S']}, MSE {row['mse']:.5f}" for row in table)]
    save_grid(torch.cat(rows), run.out / "reconstruct.png", columns=len(rows[0]), labels=labels)
    return {"n": len(x_0), "split": "test", "spacing": run.spacing, "table": table}


def interpolate(run):
    """Fig. 6: a grid between the codes in its four corners."""
    a, b, c, d = latents(run, 4).split(1)
    line = [k / 7 for k in range(8)]
    edges = [(slerp(a, b, down), slerp(c, d, down)) for down in line]
    x_T = torch.cat([slerp(left, right, across) for left, right in edges for across in line])
    x_0 = [ddim_sample(run.model, part, run.schedule, run.tau, clip=run.clip)
           for part in x_T.split(run.sample_batch_size)]
    save_grid(to_uint8(torch.cat(x_0)), run.out / "interpolation.png", columns=8)
    return {"n": len(x_T), "evaluations": len(run.tau), "spacing": run.spacing}


TASKS = {f.__name__: f for f in (sample, sweep, reconstruct, interpolate)}


def main(argv=None):
    with one_line_errors():
        run = read_args(argv, SETTINGS, preset, TASKS, ("T", "beta_1", "beta_T"), reads=("ddpm",))
        schedule = Schedule(run.T, run.beta_1, run.beta_T)
        steps = run.num_steps if run.task in ("sample", "interpolate") else 1  # others: fixed lists
        run.tau = timesteps(run.T, steps, run.spacing)
        ddim_step(torch.zeros(1), torch.zeros(1), run.T, 0, schedule, run.eta)  # refuses a bad eta
        if run.sigma_hat and run.variance == "analytic":
            raise ValueError("--sigma-hat and --variance analytic are two choices of the noise")
        run.needs_data = run.needs_data or run.variance == "analytic" or run.task == "sweep"
        setup(run)
        if schedule.alpha_bar[-1] > 0.01:
            print(f"alpha_bar_T = {schedule.alpha_bar[-1]:.2f} leaves data in x_T: multiply "
                  "--beta-1 and --beta-T by 1000 / T, but keep both below 1")
        run.data = load_data(run)
        net = UNet(run.image_channels, run.image_channels, **run.unet)
        run.model, run.schedule = eps_model(prepare(run, net)), schedule.to(run.device)
        if not run.checkpoint:
            fit(net, lambda x: ddim_loss(run.model, to_float(x), run.schedule), run.data[:1], run)
        do_tasks(run, TASKS)


# ---- Plumbing: the same text in all six scripts --------------------------------------------------

SCRIPT = Path(__file__).stem
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes of torchrun, 1 without it
RANK, LOCAL_RANK = (int(os.environ.get(k, 0)) * (WORLD > 1) for k in ("RANK", "LOCAL_RANK"))
TORCHVISION = dict(digits="MNIST", mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")
SKIPPED = r"\.|__MACOSX$|Thumbs\.db$"  # files and folders in a folder of images
IMAGE_TYPES = ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
COMMON = dict(  # flags of every script beside its settings
    dataset=("digits", "digits, mnist, fashion_mnist, cifar10 or a folder of images"),
    data_dir=("data", "where torchvision downloads to"),
    image_channels=(0, "1 for grey, 3 for colour, 0 for the images' own"),
    out=("", "run folder, by default runs/SCRIPT-DATASET, or TASK beside the checkpoint"),
    checkpoint=("", "do not train, take the EMA weights and settings of this file"),
    resume=(False, "continue the training in the run folder"),
    seed=(0, "of all random numbers"),
    device=("auto", "cuda, mps or cpu; auto takes the first available"),
    compile=(False, "torch.compile the network"),
    bf16=(False, "run the network in bfloat16, except where likelihoods are measured"),
)
HELP = dict(  # of the settings that all scripts share
    steps="training steps", batch_size="examples per step, over all processes",
    lr="Adam's learning rate", warmup="steps until the rate reaches --lr",
    lr_decay="p: after the warmup the rate falls as step^-p", num_samples="examples to sample",
    image_size="pixels, N or H W: other images are resized", dropout="rate in the network",
    grad_clip="largest gradient norm, 0: no limit", ema_decay="of averaged weights, 0: no average",
    channels="of the U-Net's first level", channel_mult="channels of each level / --channels",
    num_res_blocks="residual blocks per level", attention_resolutions="sizes with attention",
    sample_batch_size="examples sampled or tested at a time", log_every="steps between log lines",
    flip="mirror training images at random", save_every="steps between checkpoints",
)
NETWORK = ("image_channels", "image_size", "channels", "channel_mult", "num_res_blocks",
           "attention_resolutions", "dropout")
MAY_BE_0 = ("image_channels seed warmup lr_decay grad_clip ema_decay dropout hybrid guidance eta "
            "data_noise sigma_max levels eps mix_at num_steps").split()
ADVICE = {  # patterns in the text of the machine's errors, and what to do
    "allocate|out of memory|ALLOC_FAILED": "the memory is full: lower --batch-size, "
                                           "--sample-batch-size, --channels or --image-size",
    "[Cc]ompiler": "--compile needs a C++ compiler (g++ or clang): install one or leave it out",
    "PytorchStreamWriter|unexpected pos|Errno 2[78]": "cannot write: is the disk full?",
    "loading state_dict": "the checkpoint's weights do not fit its settings",
}


def fail(message):
    print(f"{SCRIPT}.py: error:", str(message).partition("\n")[0], file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors():
    """What a user can get wrong, or the machine lacks, ends with one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a code page may lack a letter of a path
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first process prints for all
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        advice = [text for pattern, text in ADVICE.items() if re.search(pattern, str(error))]
        if isinstance(error, RuntimeError) and not advice:
            raise
        fail(": ".join([*advice, str(error)]))


def seed_all(*key):
    """Make the random numbers from here on a function of key, such as (seed, step, process)."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def read_args(argv, settings, preset, tasks, fixed=(), reads=()):
    """The arguments, `run`: a flag beats the checkpoint's value, which beats preset(arguments),
    which beats settings, {name: value or (value, help)}. What is `fixed` must agree with the
    checkpoint; reads: other scripts whose checkpoints it takes."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", None, __doc__.split("\n\n")[0], add_help=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    settings = COMMON | {"task": (tuple(tasks), "what to do with the trained network")} | settings
    for key, value in settings.items():
        value, text = (value, HELP[key]) if key in HELP else value
        options = {"type": type(value)}
        if isinstance(value, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple) and isinstance(value[0], str):  # choices, default first
            options, value = {"choices": value}, value[0]
        elif isinstance(value, tuple):
            options = {"type": int, "nargs": "*" if key == "attention_resolutions" else "+"}
        parser.add_argument(f"--{key.replace('_', '-')}", default=value, help=text, **options)
    early, _ = parser.parse_known_args(argv)
    out, loaded, saved = f"runs/{SCRIPT}-{Path(early.dataset).resolve().name}", None, {}
    weights = vars(early).get("weights")
    if bool(weights) + bool(early.checkpoint) + early.resume > 1:
        fail("--checkpoint, --weights and --resume exclude each other: leave out all but one")
    if weights:
        out, loaded = f"runs/{SCRIPT}-{Path(weights).name}/{early.task}", published(weights)
    elif early.checkpoint:
        out = Path(early.checkpoint).parent / early.task
        loaded = load_checkpoint(early.checkpoint, (SCRIPT, *reads))
    out = Path(early.out or out)
    if early.resume:
        loaded = load_checkpoint(out / "checkpoint.pt", (SCRIPT,))
    if loaded:
        saved = loaded["settings"]
        if loaded["method"] != SCRIPT:  # take what the network is, not how it samples
            known = {*NETWORK, *fixed, "dataset", "data_dir", "classes"}
            saved = {key: saved[key] for key in saved.keys() & known}
        early.dataset = saved["dataset"]
    parser.set_defaults(**{"classes": ()} | preset(early) | saved)
    parser.add_argument("-h", "--help", action="help", help="show this text for a given --dataset")
    run = parser.parse_args(argv)
    run.checkpoint = run.checkpoint or weights
    if len(run.image_size) > 2:
        fail("--image-size takes one number, or height and width")
    run.image_size = (run.image_size[0], run.image_size[-1])
    for key in settings:
        flag, value = f"--{key.replace('_', '-')}", getattr(run, key)
        value = tuple(value) if isinstance(value, list) else value
        for x in value if isinstance(value, tuple) else (value,):
            if type(x) in (int, float) and not 0 < x < math.inf and (x or key not in MAY_BE_0):
                fail(f"{flag}: {x} is not a positive number")
        if key in (*NETWORK, *fixed) and saved.get(key, value) != value:
            fail(f"{flag}: the checkpoint was trained with {saved[key]}")
        setattr(run, key, value)
    run.unet = {key: getattr(run, key) for key in NETWORK[2:]} | {"image_size": max(run.image_size)}
    run.out, run.loaded, run.needs_data, run.file = out, loaded, not run.checkpoint, "checkpoint.pt"
    machine = ("task", "out", "checkpoint", "resume", "device", "compile")
    run.keys = [key for key in (*settings, "classes") if key not in machine]  # a checkpoint's
    return run


def setup(run):
    """Choose the device, make the run folder, join the processes of torchrun, seed the weights."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else mps
    name = best if run.device == "auto" else run.device
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    try:
        run.device = torch.device(name)
        torch.zeros(1, device=run.device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name} here: {error}") from error
    backend = {"backend": "gloo"}
    if run.device.type == "cuda":
        backend = {"backend": "nccl", "device_id": run.device}
        torch.cuda.set_device(run.device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    arguments = {key: getattr(run, key) for key in ("task", "checkpoint", *run.keys)}
    arguments["step"] = run.loaded["step"] if run.checkpoint else run.steps
    run.arguments, file = json.loads(json.dumps(arguments)), run.out / "results.json"
    run.results = json.loads(file.read_text()) if file.exists() else {}
    again = run.checkpoint and run.results.get("arguments") == run.arguments  # was interrupted
    run.out.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not run.resume and not again and any(run.out.iterdir()):
        raise ValueError(f"{run.out} is not empty: --resume continues it, --out names another")
    if WORLD > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(hours=2))  # for a download
    torch.manual_seed(run.seed)  # the same initial weights in every process


def load_folder(run):
    """As load_images, for the images below a folder; no training images unless run.needs_data. Sets
    run.unlabelled: the images in no class's folder."""
    root, (H, W), files, errors = Path(run.dataset), run.image_size, [], []
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        here = Path(folder)
        if "results.json" in names and here != root:  # a run folder
            inner[:], names = [], []
        inner[:] = [name for name in inner if not re.match(SKIPPED, name) and not
                    here.resolve().is_relative_to((here / name).resolve())]  # a loop of links
        files += [here.relative_to(root) / name for name in names if not re.match(SKIPPED, name)]
    top = {path: path.parts[0].lower() for path in files if path.suffix.lower() in IMAGE_TYPES}
    tests = [x for x in ("test", "val", "valid", "validation") if {"train", x} <= {*top.values()}]
    if tests:
        train, test = ([path for path in top if top[path] == name] for name in ("train", tests[0]))
    else:  # by a hash of the path: adding a file moves no other
        key = {path: zlib.crc32(path.as_posix().encode()) for path in top}
        test = [path for path in top if key[path] % 10 == 0] or sorted(top, key=key.get)[:1]
        train = top.keys() - test
    if not train:
        raise ValueError(f"{root} has {len(test)} images ({' '.join(IMAGE_TYPES)}): add some more")
    if len(train) + len(test) < len(files):
        print(f"{root}: {len(files) - len(train) - len(test)} other files are left out")
    class_of = {x: (*x.parts[bool(tests) : -1], "")[0] for x in (*train, *test)}  # below a split
    run.classes = run.classes or tuple(sorted({*class_of.values()} - {""}))
    paths = sorted(train if run.needs_data else []) + sorted(test)
    run.unlabelled = [str(root / path) for path in paths if class_of[path] not in run.classes]
    number = {name: i for i, name in enumerate(run.classes)}
    labels = torch.tensor([number.get(class_of[path], -1) for path in paths])
    mode = "L" if run.image_channels == 1 else "RGB"
    images = torch.empty(len(paths), len(mode), H, W, dtype=torch.uint8)
    Image.MAX_IMAGE_PIXELS = None  # these limits are for servers: here the user chose the files
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
    for i, path in enumerate(paths):
        try:
            image = Image.open(root / path)
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits per channel: convert it to 8")
            image.draft(None, (4 * max(H, W), 4 * max(H, W)))  # faster: JPEG's own coarser sizes
            with contextlib.suppress(Exception):  # ignore a broken EXIF block
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            images[i] = pil_to_tensor(ImageOps.fit(image.convert(mode), (W, H)))
        except Exception as error:  # whatever a broken file makes a decoder raise
            errors.append(f"{root / path}: {error}")
    if errors:
        raise ValueError(f"{len(errors)} of {len(paths)} images cannot be read: {errors[0]}")
    if not run.image_channels and torch.equal(images[:, :1].expand_as(images), images):
        images = images[:, :1].clone()  # all are grey
    n = len(paths) - len(test)
    return (images[:n], labels[:n]), (images[n:], labels[n:])


def load_images(run):
    """Training images (N, C, H, W) uint8 and labels (N,) int64, -1 for none; the same of the test
    split. Sets run.image_channels and run.classes, the names of the labels."""
    if run.dataset in TORCHVISION:
        own = run.dataset == "digits"  # they are in assets, as files of MNIST's format
        root = str(Path(__file__).parent / "assets") if own else run.data_dir
        kind = getattr(torchvision.datasets, TORCHVISION[run.dataset])
        if RANK > 0:
            dist.barrier()  # only the first process downloads
        try:
            parts = [kind(root, train=train, download=not own) for train in (True, False)]
        except (RuntimeError, OSError) as error:
            raise OSError(f"cannot download data or find them below {root}: {error}") from error
        if RANK == 0 and WORLD > 1:
            dist.barrier()
        run.classes = tuple(parts[0].classes)
        parts = [(torch.as_tensor(x.data), torch.as_tensor(x.targets)) for x in parts]
        parts = [(x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2), y) for x, y in parts]
    elif Path(run.dataset).is_dir():
        parts = load_folder(run)
    else:
        raise ValueError(f"no data set {run.dataset}: take {', '.join(TORCHVISION)} or a folder")
    run.image_channels = run.image_channels or parts[0][0].shape[1]
    if parts[0][0].shape[1] != run.image_channels:
        raise ValueError(f"{run.dataset}: the network takes {run.image_channels} channels")
    return [(resize(x, list(run.image_size), antialias=True).contiguous(), y) for x, y in parts]


def load_data(run):
    """Training images and labels, on the device if they are small; sets run.test and
    run.test_labels, in an order that --seed draws. Sampling needs no data: both may be None."""
    run.test, run.unlabelled = None, []
    try:
        train, test = load_images(run)
    except (ValueError, OSError) as error:
        if not run.checkpoint or run.task != "sample":
            raise
        print(f"process.png lacks its first row: {error}")
        return None
    order = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(run.seed))
    run.test, run.test_labels = (part[order].to(run.device) for part in test)
    device = run.device if train[0].nbytes < 2**32 else "cpu"  # 4 GB
    return [part.to(device) for part in train] if run.needs_data else None


def prepare(run, net):
    """Move net to the device, with a checkpoint's EMA weights if there is one. Returns a function
    of net's inputs that is float32 outside and, with --bf16, bfloat16 inside."""
    if run.checkpoint:
        net.eval().requires_grad_(False).load_state_dict(run.loaded["ema"])
    if run.compile:
        net.compile()
    run.net = net.to(run.device)

    def call(*inputs):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            return net(*inputs).float()

    return call


def save_checkpoint(path, state):
    """Write beside path, flush to the disk, rename: path is the old file or the new, never half."""
    with open(f"{path}.part", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def load_checkpoint(path, methods):
    """The checkpoint, on the CPU. weights_only keeps a hostile file from running code; torch.load
    accepts a flipped byte, the archive's checksums do not."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = [(r.file_size - r.compress_size, r.external_attr) for r in archive.infolist()]
            if any(map(any, headers)) or archive.testzip() is not None:
                raise ValueError("a size, a flag or a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        method, _, _ = state["method"], state["ema"], state["settings"]["dataset"]
    except Exception as error:  # whatever a damaged file makes zipfile and the unpickler raise
        raise ValueError(f"cannot read the checkpoint {path}: missing, truncated, damaged, written "
                         f"by an older version or not by these scripts: {error}") from error
    if method not in methods:
        raise ValueError(f"{path} is a checkpoint of {method}.py, not of {' or '.join(methods)}.py")
    return state


def fit(net, loss_fn, data, run):
    """Train to step run.steps, write log.jsonl and run.file, leave the EMA weights in net. A step
    draws rows of data, tensors of one length, for the scalar loss_fn(*rows). It depends on the
    weights and (seed, step, process) alone: a resumed run equals an uninterrupted one."""
    if run.batch_size % WORLD:
        raise ValueError(f"--batch-size {run.batch_size} is not a multiple of {WORLD} processes")
    weights, log, step, start = list(net.parameters()), run.out / "log.jsonl", 0, time.time()
    optimizer = torch.optim.Adam(weights, run.lr, fused=True)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    saved = {"model": net, "ema": ema, "optimizer": optimizer}
    running = torch.zeros(3, device=run.device)  # since the last line: losses, their number, stops
    size = {"n": len(data[0]), "parameters": sum(p.numel() for p in weights)}
    print(f"{[*data[0].shape]} data, {size['parameters']:,} parameters, to {run.out}")
    if run.resume:
        step = run.loaded["step"]
        if step > run.steps:
            raise ValueError(f"--steps {run.steps}: the checkpoint has done {step} already")
        for key, part in saved.items():
            part.load_state_dict(run.loaded[key])
        running[:2] += run.loaded["running"].to(run.device)
        if RANK == 0 and log.exists():  # later steps happen again: drop their lines
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            log.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= step))
    signals, stopped, first = [], False, step
    handlers = {  # the old ones; nohup ignores SIGHUP
        s: signal.signal(s, lambda number, _: signals.append(number)) for s in signal.Signals
        if s.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(s) != signal.SIG_IGN
    }
    net.train()
    while step < run.steps and not stopped:
        step += 1
        seed_all(run.seed, step, RANK)
        warm = step / max(1, run.warmup)
        optimizer.param_groups[0]["lr"] = lr = run.lr * min(1, warm, warm**-run.lr_decay)
        rows = torch.randint(len(data[0]), (run.batch_size // WORLD,), device=data[0].device)
        batch = [part[rows].to(run.device) for part in data]
        if run.flip:
            mirror = torch.rand(len(rows), 1, 1, 1, device=run.device) < 0.5
            batch[0] = torch.where(mirror, batch[0].flip(-1), batch[0])
        optimizer.zero_grad()
        loss = loss_fn(*batch)
        loss.backward()
        loss, stop = loss.detach(), torch.full_like(loss, len(signals))
        if WORLD > 1:  # these and the gradients become means over all processes, in one message
            parts = [loss, stop, *[p.grad for p in weights]]
            means = torch.cat([part.flatten() for part in parts]) / WORLD
            dist.all_reduce(means)
            for part, mean in zip(parts, means.split([x.numel() for x in parts]), strict=True):
                part.copy_(mean.view_as(part))  # in place: Adam needs the weights' layout
        norm = nn.utils.clip_grad_norm_(weights, run.grad_clip or math.inf)
        finite = loss.isfinite() & norm.isfinite()  # a tensor: whoever reads it waits for the GPU
        optimizer.found_inf = 1 - finite.float()  # at 1 the fused Adam does nothing
        optimizer.step()
        decay = min(run.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in weights], 1 - decay)
        running += torch.stack([torch.where(finite, loss, 0), finite, stop])
        stopped = bool(signals) and WORLD == 1
        if step == 1 or step % run.log_every == 0:
            total, count, stops = running.tolist()
            stopped = stops > 0  # in all processes alike
            running.zero_()
            if count == 0:
                fail(f"no loss was finite since the last log line (step {step}): lower --lr")
            pace = (time.time() - start) / (step - first)  # seconds per step
            left = datetime.timedelta(seconds=round(pace * (run.steps - step)))
            print(f"step {step} of {run.steps}: loss {total / count:.4f}, "
                  f"{run.batch_size / pace:.0f} examples/s, {left} left")
            line = {"step": step, "loss": total / count, "grad_norm": norm.item(), "lr": lr}
            with open(log if RANK == 0 else os.devnull, "a") as file:
                print(json.dumps(line), file=file)
        if RANK == 0 and (step % run.save_every == 0 or step == run.steps or stopped):
            state = {key: part.state_dict() for key, part in saved.items()}
            state |= {"method": SCRIPT, "step": step, "running": running[:2]}
            state["settings"] = {key: getattr(run, key) for key in run.keys}
            save_checkpoint(run.out / run.file, state)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        print(f"stopped after step {step}, which is saved: continue with --resume")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    net.eval().requires_grad_(False).load_state_dict(ema.state_dict())
    save_results(run, train={"step": step, **size, "seconds": round(time.time() - start, 1)})


def save_grid(images, path, columns, labels=()):
    """uint8 images (N, C, H, W) as one PNG, small ones enlarged; labels: a text beside each row."""
    images = nn.functional.interpolate(images.cpu(), scale_factor=max(1, 48 // images.shape[3]))
    grid = to_pil_image(make_grid(images, columns, pad_value=96))
    height, width = images.shape[2] + 2, 7 * max(map(len, labels), default=0)
    grid = ImageOps.expand(grid, (width, 0, 0, 0), "white")
    for row, label in enumerate(labels):
        ImageDraw.Draw(grid).text((6, row * height + height // 2 - 5), label, fill="black")
    if RANK == 0:
        grid.save(path)


def save_images(draw, run):
    """Make images/NNNNNN.png of draw(first, n, record) -> (n, C, H, W) uint8, in batches: functions
    of (seed, first), so that processes share them and what exists is not drawn again. Returns at
    most 100 images, and in the first process the states of the first batch."""
    folder, record = run.out / "images", []
    if RANK == 0 and run.results.get("arguments") != run.arguments:
        shutil.rmtree(folder, ignore_errors=True)  # they are images of other settings
    save_results(run, arguments=run.arguments)
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in range(run.num_samples)]
    for first in range(0, run.num_samples, run.sample_batch_size)[RANK::WORLD]:
        batch = files[first : first + run.sample_batch_size]
        if first == 0 or not all(file.exists() for file in batch):  # the first is recorded
            seed_all(run.seed, "batch", first)
            images = draw(first, len(batch), None if first else record).cpu()
            for image, file in zip(images, batch, strict=True):
                to_pil_image(image).save(f"{file}.part", "png")
                os.replace(f"{file}.part", file)
            print(f"{first + len(batch)} of {run.num_samples} images")
    if WORLD > 1:
        dist.barrier()
    seed_all(run.seed, "process")  # whichever batches were drawn here
    return torch.stack([pil_to_tensor(Image.open(file)) for file in files[:100]]), record


def save_results(run, **entries):
    """Add entries to results.json; all processes wait until that is done."""
    run.results |= entries
    if RANK == 0:
        (run.out / "results.json").write_text(json.dumps(run.results, indent=2) + "\n")
    if WORLD > 1:
        dist.barrier()


def do_tasks(run, tasks, also=()):
    """Do run.task and, after training for `sample`, the tasks `also`; what they return goes into
    results.json, with what it takes to repeat them."""
    for name in (run.task, *(also if run.task == "sample" and not run.checkpoint else ())):
        seed_all(run.seed, name)
        start = time.time()
        weights = vars(run).get("weights") or "EMA"
        measured = {"step": run.arguments["step"], "weights": weights, **tasks[name](run),
                    "dataset": run.dataset, "classes": run.classes, "seed": run.seed,
                    "torch": torch.__version__, "torchvision": torchvision.__version__,
                    "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - start, 1)}
        save_results(run, **{name: measured}, arguments=run.arguments)
    if WORLD > 1:
        dist.destroy_process_group()
    print(f"{run.out} holds {', '.join(sorted(file.name for file in run.out.iterdir()))}")


if __name__ == "__main__":
    main()
