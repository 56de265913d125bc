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
import copy
import datetime
import glob
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
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


@torch.no_grad()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, clip=False, sigma_hat=False, gamma=None,
                callback=None):
    """x_T ~ N(0, I) -> x_0, like x_T, in len(tau) evaluations of the model; tau from `timesteps`.

    eta (Table 1): 0 is DDIM, deterministic (Fig. 5); 1 is DDPM's sampler, with exactly its small
    variance if tau = 1..T.
    sigma_hat: the mean of eta = 1 with the noise of DDPM's larger variance (App. D.3).
    gamma: of analytic_gamma; the mean of eta, noise of analytic_sigmas. ValueError with sigma_hat.
    callback(i, x_t) is called with every state, i the steps that are left: S for x_T, 0 for x_0."""
    if sigma_hat and gamma is not None:
        raise ValueError("sigma_hat and gamma are two choices of the noise: take one of them")
    callback = (lambda i, x_t: None) if callback is None else callback
    x_t, sigmas = x_T, None
    if sigma_hat:
        alpha_bar = schedule.alpha_bar[tau]
        eta, sigmas = 1.0, [0.0, *(1 - alpha_bar[1:] / alpha_bar[:-1]).sqrt()]  # App. D.3
    elif gamma is not None:
        sigmas = analytic_sigmas(tau, gamma, schedule, eta, clip)
    for i in range(len(tau), 0, -1):
        t, s = tau[i - 1], tau[i - 2] if i > 1 else 0
        callback(i, x_t)
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        no_noise = torch.zeros_like(x_t) if sigmas else None  # it has its own, below
        x_t = ddim_step(x_t, eps, t, s, schedule, eta, no_noise, clip)
        if sigmas and s > 0:
            x_t = x_t + sigmas[i - 1] * torch.randn_like(x_t)
    callback(0, x_t)
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

METHOD = "ddim"  # in checkpoints
FIXED = ("T", "beta_1", "beta_T")  # a checkpoint decides these
READS = {"ddpm": {}}  # other methods' checkpoints, and settings that these lack
SETTINGS = dict(  # CIFAR-10, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,  # DDPM, App. B
    num_res_blocks=2, attention_resolutions=[16], dropout=0.1, image_size=[32, 32],  # App. B
    channels=128, channel_mult=[1, 2, 2, 2], warmup=5000, grad_clip=1.0,  # DDPM's code
    num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
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
    image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], attention_resolutions=[14],
    steps=50_000, flip=False, warmup=1000, spacing="linear", num_steps=50,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "mnist": MNIST, "fashion_mnist": MNIST,
    "folder": dict(flip=False, spacing="linear"),  # App. D.2
    # Not in the paper: trains in minutes on a laptop. The betas sum to 6, not to 10, as less
    # noise hides an image of 16x16 pixels.
    "digits": dict(
        T=250, beta_1=0.008, beta_T=0.04, spacing="linear", num_steps=20, image_size=[16, 16],
        channels=16, channel_mult=[1, 2, 4], num_res_blocks=1, attention_resolutions=[],
        dropout=0.0, lr=1.2e-2, steps=2200, flip=False, warmup=900, lr_decay=3.0, num_samples=64,
        num_test=16, save_every=500,
    ),
}


def preset(args):
    return PRESETS.get(args.dataset, PRESETS["folder"])


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    if not x.isfinite().all():
        raise ValueError("a sample is not finite")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def latents(args, device, n):
    return torch.randn(n, args.image_channels, *args.image_size, device=device)


def optimal_gamma(args, device, net, schedule):
    """analytic_gamma of 256 training images."""
    images, _ = load_images(args, device)
    few = torch.randperm(len(images))[:256].to(images.device)
    return analytic_gamma(eps_model(net), to_float(images[few].to(device)), schedule)


def draw(args, device, net, schedule, n, **options):
    tau = timesteps(args.T, args.num_steps, args.spacing)
    return ddim_sample(eps_model(net), latents(args, device, n), schedule, tau, **options)


def sample(args, device, net, schedule):
    analytic, states = args.variance == "analytic", {}
    options = {"eta": args.eta, "sigma_hat": args.sigma_hat,
               "clip": args.clip or args.sigma_hat or analytic, "callback": partial(keep, states)}
    if analytic:
        options["gamma"] = optimal_gamma(args, device, net, schedule)
    net = fast(net, args, device)
    for first, n in batches(args):
        save_images(to_uint8(draw(args, device, net, schedule, n, **options)), first, args)
    save_pictures(args, states, to_uint8)
    return {"n": args.num_samples, "evaluations": args.num_steps, "clip": options["clip"]}


def sweep(args, device, net, schedule):
    """Table 1 and Fig. 5 as pictures: one x_T for every eta and number of steps; Analytic-DPM."""
    x_T, rows, table = latents(args, device, 10), [], []
    gamma = optimal_gamma(args, device, net, schedule)
    model = eps_model(fast(net, args, device))
    model(x_T, torch.ones(len(x_T), device=device))  # the first call is slower
    options = {str(eta): dict(eta=eta, clip=args.clip) for eta in (0.0, 0.2, 0.5, 1.0)}
    options["sigma-hat"] = dict(eta=1.0, clip=True, sigma_hat=True)
    for eta in (0.0, 1.0):
        options[f"{eta}, analytic"] = dict(eta=eta, clip=True, gamma=gamma)
    for eta in options:
        for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, 1000)}):
            tau, start = timesteps(args.T, S, args.spacing), time.time()
            seed_all(args.seed, "noise")  # the same in each row
            rows.append(to_uint8(ddim_sample(model, x_T, schedule, tau, **options[eta])).cpu())
            table.append({"eta": eta, "S": S, "seconds": round(time.time() - start, 2)})
            print("eta {eta}: {S} evaluations, {seconds} s".format(**table[-1]))
    labels = ["eta {eta}, {S} evaluations".format(**row) for row in table]
    save_grid(torch.cat(rows), Path(args.out, "sweep.png"), columns=10, labels=labels)
    return {"n": len(x_T), "table": table}


def reconstruct(args, device, net, schedule):
    """Table 2: encode test images and decode them with the same steps."""
    model, x_0, table = eps_model(net), to_float(load_images(args, device, args.num_test)[0]), []
    rows = [to_uint8(x_0[:10])]
    for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, 200, 500, 1000)}):
        tau, decoded = timesteps(args.T, S, args.spacing), []
        for x in x_0.split(args.sample_batch_size):
            x_T = ddim_encode(model, x, schedule, tau)
            decoded.append(ddim_sample(model, x_T, schedule, tau))
        decoded = torch.cat(decoded)
        mse = ((decoded - x_0) / 2).square().flatten(1).mean(1)  # (n,), for data in [0, 1]
        error = round(mse.std().item() / len(mse)**0.5, 6) if len(mse) > 1 else None
        table.append({"S": S, "mse": mse.mean().item(), "standard_error": error})
        print(f"S = {S}: {mse.mean().item():.6f} +- {error}")
        rows.append(to_uint8(decoded[:10]))
    labels = ["originals", *(f"S = {row['S']}, MSE {row['mse']:.5f}" for row in table)]
    save_grid(torch.cat(rows), Path(args.out, "reconstruct.png"), len(rows[0]), labels)
    return {"n": len(x_0), "split": "test", "table": table}


def interpolate(args, device, net, schedule):
    """Fig. 6: a grid between the codes in its four corners."""
    a, b, c, d = latents(args, device, 4).split(1)
    line, tau = [k / 7 for k in range(8)], timesteps(args.T, args.num_steps, args.spacing)
    edges = [(slerp(a, b, down), slerp(c, d, down)) for down in line]
    x_T = torch.cat([slerp(left, right, across) for left, right in edges for across in line])
    model = eps_model(fast(net, args, device))
    x_0 = torch.cat([ddim_sample(model, part, schedule, tau, clip=args.clip)
                     for part in x_T.split(args.sample_batch_size)])
    save_grid(to_uint8(x_0), Path(args.out, "interpolation.png"), columns=8)
    return {"n": len(x_T), "evaluations": len(tau)}


TASKS = {f.__name__: f for f in (sample, sweep, reconstruct, interpolate)}


def main(argv=None):
    args, loaded, trains = read_args(argv)
    schedule = Schedule(args.T, args.beta_1, args.beta_T)
    if args.task in ("sample", "interpolate") or trains and args.preview:
        timesteps(args.T, args.num_steps, args.spacing)  # refuses more than T
    if args.eta > 1:
        raise ValueError(f"--eta {args.eta} is more than 1")
    if args.sigma_hat and args.variance == "analytic":
        raise ValueError("--sigma-hat and --variance analytic are two choices of the noise")
    device = setup(args)
    if schedule.alpha_bar[-1] > 0.01:
        print(f"alpha_bar_T = {schedule.alpha_bar[-1]:.2f} leaves data in x_T: multiply "
              "--beta-1 and --beta-T by 1000 / T, keeping both below 1")
    schedule.to(device)
    if trains:
        images, _ = load_images(args, device)
        args.image_channels = images.shape[1]
    C = args.image_channels
    net = UNet(C, C, **{key: getattr(args, key) for key in UNET}).to(device)
    if trains:
        fit(net, lambda model, x: ddim_loss(eps_model(model), to_float(x), schedule), [images],
            args, device, loaded, lambda ema: to_uint8(draw(
                args, device, ema, schedule, args.preview, eta=args.eta, clip=args.clip)))
    else:
        net.load_state_dict(loaded["ema"])
    net.eval().requires_grad_(False)
    do_tasks(args, loaded, trains, TASKS, (), device, net, schedule)


# ---- Plumbing: the same text in all six scripts --------------------------------------------------

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes of torchrun, 1 without it
RANK, LOCAL_RANK = (int(os.environ.get(key, 0)) % WORLD for key in ("RANK", "LOCAL_RANK"))
TORCHVISION = dict(digits="MNIST", mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")
UNET = ("image_size", "channels", "channel_mult", "num_res_blocks", "attention_resolutions",
        "dropout")
COMMON = dict(  # flags of every script, beside its SETTINGS
    dataset=("digits", "digits, mnist, fashion_mnist, cifar10 or a folder of images"),
    data_dir=("data", "where torchvision downloads to"), seed=(0, "of all random numbers"),
    image_channels=((0, 1, 3), "1: grey, 3: colour, 0: like the training images"),
    lr_decay=(0.0, "p: after --warmup the learning rate falls as step^-p"),
)
THIS_RUN = dict(  # flags of every script that a checkpoint does not set
    task=(tuple(TASKS), "what to do with the trained network"),
    out=("", "run folder, by default runs/METHOD-DATASET, or TASK beside the checkpoint"),
    checkpoint=("", "do not train, take the EMA weights and the settings of this file"),
    resume=(False, "continue the training in the run folder"), device=("auto", "cuda, mps or cpu"),
    preview=(16, "samples to draw after checkpoints 1, 2, 4, 8, ...; 0: none"),
    compile=(False, "torch.compile the network, except where something is measured"),
    bf16=(False, "run the network in bfloat16, except where something is measured"),
)


def parse_flags(argv):
    """The table's values, and those of the flags that are given: {name: value} each."""
    about = __doc__.split("\n\n")[0] + " In brackets: the values for cifar10."
    parser = argparse.ArgumentParser(description=about, argument_default=argparse.SUPPRESS)
    sources, defaults = parser.add_mutually_exclusive_group(), {}
    for key, entry in (COMMON | THIS_RUN | SETTINGS).items():
        value, text = entry if isinstance(entry, tuple) else (entry, "")
        default = defaults[key] = value[0] if isinstance(value, tuple) else value
        kind = {tuple: {"choices": value, "type": type(default)}, list: {"type": int, "nargs": "*"},
                bool: {"action": argparse.BooleanOptionalAction}}
        group = sources if key in ("checkpoint", "weights", "resume") else parser
        group.add_argument(f"--{key.replace('_', '-')}", help=f"{text} [{default}]",
                           **kind.get(type(value), {"type": type(value)}))
    flags = vars(parser.parse_args(argv))
    for key, value in flags.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            parser.error(f"--{key.replace('_', '-')}: {value} is not a finite number >= 0")
    if "image_size" in flags:
        flags["image_size"] = (2 * flags["image_size"])[:2]  # one number: both
    given = {key: x for key, x in flags.items() if x != "auto" or key not in SETTINGS}
    return defaults, given  # "auto" leaves the choice to preset


def read_args(argv):
    """The arguments, flags and nothing else; the checkpoint to sample from or to resume, or None;
    whether this run trains. A flag beats the checkpoint's setting, which beats preset(args), which
    beats SETTINGS; but on what defines the network and the process, flag and checkpoint agree."""
    defaults, flags = parse_flags(argv)
    args = argparse.Namespace(**defaults | flags)
    loaded, saved = None, {}
    weights = vars(args).get("weights")
    out = Path("runs", f"{METHOD}-{Path(weights or args.dataset).resolve().name}")
    if weights:
        out, loaded = out / args.task, published(weights)
    elif args.checkpoint:
        out = Path(args.checkpoint).parent / args.task
        loaded = load_checkpoint(args.checkpoint, [METHOD, *READS])
    elif args.resume:
        loaded = load_checkpoint(Path(args.out or out, "checkpoint.pt"), [METHOD])
    flags["out"] = args.out or str(out)
    fixed = {"image_channels", *UNET, *FIXED}
    if loaded:
        own = loaded["method"] == METHOD  # else take what the network is, not how it samples
        read = defaults.keys() - THIS_RUN.keys() if own else fixed | {"dataset", "data_dir"}
        saved = {key: x for key, x in loaded["settings"].items() if key in read}
        saved = READS.get(loaded["method"], {}) | saved
    for key in fixed & saved.keys() & flags.keys():
        if flags[key] != saved[key]:
            raise ValueError(f"--{key.replace('_', '-')}: the checkpoint has {saved[key]}")
    changes = preset(argparse.Namespace(**defaults | saved | flags))
    args = argparse.Namespace(**defaults | changes | saved | flags)
    sizes = [max(args.image_size) // 2**i for i in range(len(args.channel_mult))]
    if not {*args.attention_resolutions} <= {*sizes}:
        raise ValueError(f"--attention-resolutions: the levels of the network have sizes {sizes}, "
                         f"not {args.attention_resolutions}")
    return args, loaded, args.resume or not loaded


def load_checkpoint(path, methods):
    """The checkpoint, on the CPU. weights_only keeps a hostile file from running code; torch.load
    accepts a flipped byte, the archive's checksums do not."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["method"] not in methods:
            raise ValueError(f"it is a checkpoint of {state['method']}")
        if not all(x.isfinite().all() for x in state["ema"].values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # whatever a damaged file makes zipfile and the unpickler raise
        reason = str(error).partition("\n")[0]  # torch says more
        raise ValueError(f"{path} is missing, damaged or not one of {' or '.join(methods)}: "
                         f"{reason}") from error
    return state


def setup(args):
    """Make the run folder, join torchrun's processes, seed the initial weights -> the device."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    out = Path(args.out)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first process prints for all
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not args.resume and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: --out OTHER, or --resume to continue a training")
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    if WORLD > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # for a download
    torch.manual_seed(args.seed % 2**63)  # takes any --seed; the same weights in every process
    return device


def seed_all(*key):
    """Seed all generators with a hash of key, such as (seed, step, process)."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def load_folder(args, num_test):
    """Like load_images, for the images below a folder."""
    root, (H, W) = Path(args.dataset), args.image_size
    found = [Path(x) for x in glob.glob("**/*", root_dir=root, recursive=True)]  # no hidden files
    runs = {x.parent for x in found if x.name in ("log.jsonl", "results.json")} - {Path()}
    crc = {x: zlib.crc32(x.as_posix().encode()) for x in found if not runs & {*x.parents}
           and x.suffix.lower() in IMG_EXTENSIONS and "__MACOSX" not in x.parts}
    files = sorted(crc, key=crc.get)  # so that the first ones are a fair sample
    top = {x: x.parts[0].lower() for x in files}
    tests = [x for x in ("test", "val", "valid", "validation") if {"train", x} <= {*top.values()}]
    if tests:
        files = [x for x in files if top[x] in ("train", tests[0])]
        test = [x for x in files if top[x] == tests[0]]
    else:  # by a hash of the path: adding a file moves no other
        test = [x for x in files if crc[x] % 10 == 0] or files[:1]
    train = sorted({*files} - {*test}, key=crc.get)
    paths = train if num_test is None else test[:num_test]
    class_of = {x: x.parts[bool(tests) : -1][:1] for x in files}  # (the folder below a split,)
    names = sorted({(), *class_of.values()})  # of no folder, (), is the first: label -1
    labels = torch.tensor([names.index(class_of[x]) - 1 for x in paths])
    mode, C = ("L", 1) if args.image_channels == 1 else ("RGB", 3)
    images = torch.empty(len(paths), C, H, W, dtype=torch.uint8)
    for i, path in enumerate(paths):
        try:
            image = Image.open(root / path)
            if image.mode[0] in "IF" or ";16" in str(image.tile):  # integers, floats, 16-bit RGB
                raise ValueError("more than 8 bits per channel")
            image.draft(None, (4 * max(H, W), 4 * max(H, W)))  # faster: JPEG's own coarser sizes
            image = ImageOps.exif_transpose(image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            images[i] = pil_to_tensor(ImageOps.fit(image.convert(mode), (W, H)))
        except Exception as error:  # whatever a broken file makes a decoder raise
            raise ValueError(f"cannot read {root / path}: {error}") from error
    if not args.image_channels and torch.equal(images[:, :1].expand_as(images), images):
        images = images[:, :1].clone()  # all are grey
    return images, labels


def load_images(args, device, num_test=None):
    """Images (N, C, H, W) uint8 and labels (N,) int64, -1 for none: for training, or the first
    num_test ones for testing. On the device, unless the training images are large."""
    if args.dataset in TORCHVISION:
        kind = getattr(torchvision.datasets, TORCHVISION[args.dataset])
        root = Path(__file__).parent / "assets" if args.dataset == "digits" else args.data_dir
        if LOCAL_RANK == 0:  # the first process of each machine
            kind(root, download=args.dataset != "digits")
        if WORLD > 1:
            dist.barrier()
        data = kind(root, train=num_test is None)
        images, labels = (torch.as_tensor(x)[:num_test] for x in (data.data, data.targets))
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        images = resize(images, args.image_size, antialias=True).contiguous()
    else:
        images, labels = load_folder(args, num_test)
    if len(images) == 0:
        raise ValueError(f"no {'training' if num_test is None else 'test'} images in "
                         f"{args.dataset}: take {', '.join(TORCHVISION)} or a folder of images")
    if args.image_channels not in (0, images.shape[1]):
        raise ValueError(f"--image-channels {args.image_channels}, but {args.dataset} has others")
    device = device if num_test or images.nbytes < 2**32 else "cpu"  # 4 GB
    return images.to(device), labels.to(device)


def fast(net, args, device):
    """net with --compile and --bf16 applied; its outputs are float32."""
    net = torch.compile(net) if args.compile else net
    net = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)(net)
    return lambda x, *t: net(x, *t).float()


def fit(net, loss_fn, data, args, device, loaded=None, preview=None, method=METHOD,
        file="checkpoint.pt", again="repeat the command with --resume"):
    """Train net to step args.steps; write log.jsonl and file; leave the EMA weights in net.
    data: tensors of one length: each step draws a batch of their rows for loss_fn(model, *batch), a
    scalar. loaded: a checkpoint to continue; preview(net): uint8 images to look at. A step's random
    numbers depend on (seed, step, process) alone: a resumed run equals an uninterrupted one."""
    parameters, out = list(net.parameters()), Path(args.out)
    first = loaded["step"] if loaded else 0
    if first > args.steps:
        raise ValueError(f"--steps {args.steps}: the checkpoint has done {first} already")
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(parameters, args.lr, fused=True)
    parts = {"model": net, "ema": ema, "optimizer": optimizer}
    if loaded:
        for key, part in parts.items():
            part.load_state_dict(loaded[key])
        shutil.rmtree(out / "images", ignore_errors=True)  # drawn by earlier weights
    print(f"{sum(p.numel() for p in parameters):,} parameters, data {[*data[0].shape]}, in {out}")
    signals = []
    handlers = {number: signal.signal(number, lambda n, _: signals.append(n))
                for number in (signal.SIGINT, signal.SIGTERM)}
    model = fast(nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net, args, device)
    ema_weights, new_weights = list(ema.parameters()), [p.detach() for p in parameters]
    total, count = 0.0, 0
    start = time.perf_counter()
    net.train()
    for step in range(first + 1, args.steps + 1):
        seed_all(args.seed, step, RANK)
        n = (args.batch_size + RANK) // WORLD  # these add up to the batch size
        rows = torch.randint(len(data[0]), (n,), device=data[0].device)
        batch = [part[rows].to(device) for part in data]
        if args.flip:
            mirror = torch.rand(n, 1, 1, 1, device=device) < 0.5
            batch[0] = torch.where(mirror, batch[0].flip(-1), batch[0])
        loss = loss_fn(model, *batch)
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel averages the gradients of the processes
        norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        warm = step / max(1, args.warmup)
        lr = args.lr * min(1, warm, warm**-args.lr_decay)  # rises linearly, then falls
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema_weights, new_weights, 1 - decay)
        total, count = total + loss.detach(), count + 1

        if RANK > 0:
            continue  # the first process logs, saves and stops for all
        stop, due = bool(signals), step % args.save_every == 0
        save = stop or due or step == args.steps
        if save or step == 1 or step % args.log_every == 0:
            line = {"step": step, "loss": float(total / count), "grad_norm": norm.item(), "lr": lr}
            if not torch.stack([x.isfinite().all() for x in (total, norm, *new_weights)]).all():
                raise ValueError(f"loss, gradient or weights not finite, try a lower --lr: {line}")
            total, count = 0.0, 0
            pace = (time.perf_counter() - start) / (step - first)  # seconds per step
            print(f"step {step} of {args.steps}: loss {line['loss']:.4f}, {1 / pace:.3g} steps/s, "
                  f"{pace * (args.steps - step) / 60:.1f} minutes left", flush=True)
            with open(out / "log.jsonl", "a") as log:
                print(json.dumps(line), file=log)
        if save:
            state = {key: part.state_dict() for key, part in parts.items()}
            state |= {"method": method, "step": step, "settings": vars(args)}
            torch.save(state, out / f"{file}.part")
            os.replace(out / f"{file}.part", out / file)  # the old file or the new, never half
        if stop:
            print(f"stopped after step {step}, saved as {out / file}: {again}")
            sys.exit(128 + signals[0])
        power_of_2 = (step // args.save_every).bit_count() == 1  # checkpoint 1, 2, 4, 8, ...
        if preview and args.preview and due and power_of_2 and step < args.steps:
            seed_all(args.seed, "preview")
            save_grid(preview(ema), out / f"samples-{step}.png")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    net.load_state_dict(ema.state_dict())


def batches(args):
    """Yield (first, n) for each of this process's batches: n samples, numbered from first, whose
    random numbers depend on first alone."""
    for first in range(0, args.num_samples, args.sample_batch_size)[RANK::WORLD]:
        n = min(args.sample_batch_size, args.num_samples - first)
        seed_all(args.seed, "batch", first)
        yield first, n
        print(f"{first + n} of {args.num_samples} samples", flush=True)
    if WORLD > 1:
        dist.barrier()


def keep(states, n, x):
    """A sampler's callback, as partial(keep, states): keep eight samples of the first batch,
    {n: x}, at 16 evenly spaced n. The first n is the number of all steps."""
    if n not in states and n in {math.ceil(max(states, default=n) * k / 15) for k in range(16)}:
        states[n] = x[:8].clone()


def save_images(images, first, args):
    """Write uint8 images (n, C, H, W) as images/NNNNNN.png, numbered from first."""
    folder = Path(args.out, "images")
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images.cpu(), first):
        to_pil_image(image).save(folder / f"{i:06d}.png")


def save_pictures(args, states, to_uint8, columns=0):
    """samples.png: the first 100 images, whichever process drew them, in a square or so many
    columns; process.png: the states of some samples from noise to image."""
    files = sorted(Path(args.out, "images").iterdir())[:100]
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    save_grid(images, Path(args.out, "samples.png"), columns)
    if states:
        rows = torch.stack([*states.values()], dim=1)  # (8, 16, C, H, W)
        save_grid(to_uint8(rows.flatten(0, 1)), Path(args.out, "process.png"), len(states))


def save_grid(images, path, columns=0, labels=()):
    """uint8 images (N, C, H, W) as one PNG, small ones enlarged; labels: a text beside each row."""
    images = nn.functional.interpolate(images.cpu(), scale_factor=max(1, 48 // images.shape[3]))
    grid = make_grid(images, columns or math.ceil(len(images) ** 0.5), pad_value=96)
    height, width = images.shape[2] + 2, 7 * max(map(len, labels), default=0)
    grid = ImageOps.expand(to_pil_image(grid), (width, 0, 0, 0), "white")
    for row, label in enumerate(labels):
        ImageDraw.Draw(grid).text((6, row * height + height // 2 - 5), label, fill="black")
    if RANK == 0:
        grid.save(path)


def do_tasks(args, loaded, trains, tasks, also, *objects):
    """Do args.task, and `also` after a training with --task sample; write results.json."""
    results = {"arguments": vars(args), "step": args.steps if trains else loaded["step"],
               "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    names = [args.task, *also] if trains and args.task == "sample" else [args.task]
    for name in names:
        seed_all(args.seed, name)
        results[name] = tasks[name](args, *objects)
        text = json.dumps(results, indent=2, allow_nan=False)
        if RANK == 0:
            Path(args.out, "results.json").write_text(f"{text}\n")
    print(f"{args.out} holds {', '.join(sorted(file.name for file in Path(args.out).iterdir()))}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
