"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239).

Implements: Eq. (1), (2), (3), (4), (5), (6), (7), (8), (11), (12), (13), (14), (15); Alg. 1, 2;
Fig. 8; Table 2 (L), 4.

    t               time, 1 (almost data) ... T (noise)         (B,) int64; the network gets t - 1
    x_0             data: 8-bit images scaled linearly          (B, C, H, W) in [-1, 1]
    x_t             x_0 after t steps of noise                  (B, C, H, W)
    eps, z          noise of the forward, the reverse process   like x_0, N(0, I)
    beta, alpha     forward variance, 1 - beta                  (T + 1,), index = t, beta[0] = 0
    alpha_bar       product of alpha_1 ... alpha_t              (T + 1,), alpha_bar[0] = 1
    beta_tilde      variance of q(x_{t-1} | x_t, x_0)           (T + 1,), beta_tilde[1] = 0
    model(x_t, t)   the network eps_theta                       like x_t

    python ddpm.py                                              train on digits, sample, bits/dim
    python ddpm.py --dataset cifar10                            the paper's run
    python ddpm.py --checkpoint runs/ddpm-digits/checkpoint.pt --task interpolate

README.md has measured results. Deviations from the paper, 1 to 3 as in the released code:
1. x_0_hat is clipped to [-1, 1] in the sampler and in the bound (--no-clip: Alg. 2 as printed).
2. The learning rate warms up and the gradient norm is clipped at 1.
3. sigma_1^2 is beta_tilde_2; and --objective vlb takes one random term, without the factor T.
4. The EMA decay after n steps is min(decay, (1 + n) / (10 + n)), to forget the initial weights.
5. Norms are means over dimensions, not sums: with gradient clipping the scale matters.
6. The decoder's normal CDF is exact; the released code approximates it with a tanh.
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


def q_posterior(x_0, x_t, t, schedule):
    """Mean (B, ...) and variance (B, 1, ..., 1) of q(x_{t-1} | x_t, x_0), Eq. (6); t in 1..T."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    of_x_0 = alpha_bar_prev.sqrt() * schedule.beta[t] / (1 - alpha_bar)
    of_x_t = schedule.alpha[t].sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = expand(of_x_0, x_t) * x_0 + expand(of_x_t, x_t) * x_t  # Eq. (7)
    return mean, expand(schedule.beta_tilde[t], x_t)  # Eq. (7)


def predict_x_0(x_t, t, eps, schedule):
    """x_0_hat, like x_t: Eq. (4) solved for x_0 with the predicted eps; t in 1..T."""
    signal, std = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
    return (x_t - expand(std, x_t) * eps) / expand(signal, x_t)  # Eq. (15)


def eps_model(net):
    """model(x_t, t), t in 1..T, of a network that counts from 0, as the released ones do."""
    return lambda x_t, t: net(x_t, t - 1)


def ddpm_loss(model, x_0, schedule):
    """L_simple, Alg. 1: a scalar, the mean over the batch and all dimensions, for x_0 in [-1, 1].
    It is 1 in expectation for a model that returns 0."""
    t = torch.randint(1, schedule.T + 1, (len(x_0),), device=x_0.device)  # Alg. 1, line 3
    eps = torch.randn_like(x_0)  # Alg. 1, line 4
    eps_hat = model(q_sample(x_0, t, eps, schedule), t)
    return (eps - eps_hat).square().mean()  # Alg. 1, line 5; Eq. (14)


def vlb_loss(model, x_0, schedule):
    """A random term of the bound, in nats per dimension: a scalar. Up to a constant, T times its
    mean is the bound with sigma_t^2 = beta_t and a Gaussian decoder for L_0 (Table 2's L)."""
    t = torch.randint(1, schedule.T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    error = (eps - model(q_sample(x_0, t, eps, schedule), t)).square()
    # beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) with sigma_t^2 = beta_t
    weight = schedule.beta[t] / (2 * schedule.alpha[t] * (1 - schedule.alpha_bar[t]))
    return (expand(weight, error) * error).mean()  # Eq. (12)


def p_mean_variance(model, x_t, t, schedule, variance="large", clip=True):
    """Mean (B, ...), variance (B, 1, ..., 1) of p(x_{t-1} | x_t), Eq. (1), and x_0_hat; t in 1..T.
    variance "large": beta_t, best for x_0 ~ N(0, I); "small": beta_tilde_t, best for one fixed x_0
    (Sec. 3.2). At t = 1 both are beta_tilde_2, as released: only the decoder, Eq. (13), uses it."""
    if variance not in ("large", "small"):
        raise ValueError(f"variance is {variance!r}, not 'large' or 'small'")
    x_0_hat = predict_x_0(x_t, t, model(x_t, t), schedule)  # Eq. (15)
    if clip:
        x_0_hat = x_0_hat.clamp(-1, 1)  # released code, not in the paper
    mean, _ = q_posterior(x_0_hat, x_t, t, schedule)  # unclipped, Eq. (15) in Eq. (7) is Eq. (11)
    table = schedule.beta if variance == "large" else schedule.beta_tilde
    variance = torch.where(t > 1, table[t], schedule.beta_tilde[2])
    return mean, expand(variance, x_t), x_0_hat


def record_steps(T):
    """At most 15 evenly spaced steps of 1..T, ascending: a sampler records its states there."""
    return sorted({math.ceil(T * k / 15) for k in range(1, 16)})


@torch.no_grad()
def ddpm_sample(model, x_T, schedule, variance="large", clip=True, t_start=None, record=None):
    """Alg. 2: x_T ~ N(0, I) -> x_0, like x_T, in T evaluations of the model.
    t_start: begin at this step, with x_T as its x_t. record: a list that gets x_t at the steps of
    record_steps, from t_start down, and x_0."""
    x_t, t_start = x_T, schedule.T if t_start is None else t_start
    recorded = () if record is None else record_steps(t_start)
    for step in range(t_start, 0, -1):  # Alg. 2, line 2
        if step in recorded:
            record.append(x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        mean, var, _ = p_mean_variance(model, x_t, t, schedule, variance, clip)
        z = torch.randn_like(x_t) if step > 1 else torch.zeros_like(x_t)  # Alg. 2, line 3
        # (x_t - (1 - alpha_t) / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t) + sigma_t z
        x_t = mean + var.sqrt() * z  # Alg. 2, line 4
    if record is not None:
        record.append(x_t)
    return x_t


def decoder_log_prob(x_0, mean, var):
    """log p(x_0 | x_1) in nats, like x_0: the mass that N(mean, var) puts on each pixel's level.
    x_0: 8-bit levels v as v / 127.5 - 1; the lowest and the highest level include the tails."""
    upper = torch.where(x_0 > 0.999, math.inf, (x_0 + 1 / 255 - mean) / var.sqrt())  # Eq. (13)
    lower = torch.where(x_0 < -0.999, -math.inf, (x_0 - 1 / 255 - mean) / var.sqrt())  # Eq. (13)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)  # Eq. (13)
    return mass.clamp(min=1e-12).log()  # the floor: released code, not in the paper


@torch.no_grad()
def bits_per_dim(model, x_0, schedule, variance="large", clip=True):
    """The variational bound on -log2 p(x_0) per dimension, each term of Eq. (5) with one x_t.
    x_0 is 8-bit data in [-1, 1]. Returns, in bits per dimension, "total" (B,), "L_T" (B,), "L_t"
    (B, T - 1): the KL terms of t = 2..T in this order, and "L_0" (B,); also "mse" (B, T): the mean
    squared error of x_0_hat for t = 1..T, in x_0's units."""
    precise = schedule.beta.dtype
    terms, mse = [], []
    for step in range(1, schedule.T + 1):
        t = torch.full((len(x_0),), step, device=x_0.device)
        x_t = q_sample(x_0, t, torch.randn_like(x_0), schedule)
        p_mean, p_var, x_0_hat = p_mean_variance(model, x_t, t, schedule, variance, clip)
        q_mean, q_var = q_posterior(x_0, x_t, t, schedule)
        p_mean, p_var, q_mean, q_var = (a.to(precise) for a in (p_mean, p_var, q_mean, q_var))
        if step == 1:
            nats = -decoder_log_prob(x_0.to(precise), p_mean, p_var)  # L_0, Eq. (13)
        else:  # L_{t-1}, the KL divergence of two Gaussians; Eq. (8) leaves out the variances' part
            ratio = q_var / p_var
            nats = 0.5 * (ratio - 1 - ratio.log() + (q_mean - p_mean).square() / p_var)  # Eq. (8)
        terms.append(nats.flatten(1).mean(1) / math.log(2))
        mse.append((x_0_hat - x_0).square().flatten(1).mean(1))
    # L_T, KL(q(x_T | x_0) || N(0, I))
    alpha_bar_T, square = schedule.alpha_bar[-1], x_0.to(precise).square().flatten(1).mean(1)
    L_T = 0.5 * (alpha_bar_T * square - alpha_bar_T - (1 - alpha_bar_T).log()) / math.log(2)
    L_0, L_t = terms[0], torch.stack(terms[1:], dim=1)
    total = L_T + L_t.sum(1) + L_0  # Eq. (3), (5)
    return {"total": total, "L_T": L_T, "L_t": L_t, "L_0": L_0, "mse": torch.stack(mse, dim=1)}


def rate_distortion(bits):
    """Table 4 from bits_per_dim's terms: rate (T,) in bits/dim and distortion (T,), an RMSE on the
    scale 0..255, by reverse time r = T - t + 1: after x_T, ..., x_t are received, without L_0."""
    received = torch.cat([bits["L_T"][:, None], bits["L_t"].flip(1)], dim=1)  # x_T, ..., x_1
    rate = received.mean(0).cumsum(0)  # Sec. 4.3
    return rate, bits["mse"].mean(0).flip(0).sqrt() * 127.5  # Sec. 4.3


def interpolate(model, x_0, x_0_prime, t, fractions, schedule, variance="large", clip=True):
    """Fig. 8: images between x_0 and x_0_prime, both (B, ...), mixed as x_t: list of (B, ...).
    Each image is diffused to step t once, with noise of its own that stays fixed for all fractions
    (the paper's lambda; 0: x_0, 1: x_0_prime); the mixture of both is decoded from step t on."""
    steps = torch.full((len(x_0),), t, device=x_0.device)
    x_t = q_sample(x_0, steps, torch.randn_like(x_0), schedule)
    x_t_prime = q_sample(x_0_prime, steps, torch.randn_like(x_0), schedule)
    mixed = [(1 - fraction) * x_t + fraction * x_t_prime for fraction in fractions]  # Sec. 4.4
    return [ddpm_sample(model, m, schedule, variance, clip, t_start=t) for m in mixed]


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # the paper's CIFAR-10 run, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,  # App. B
    num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=(32, 32),  # App. B
    channels=128, channel_mult=(1, 2, 2, 2), warmup=5000, grad_clip=1.0,  # released code
    lr_decay=0.0, num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
    T=(1000, "steps of the process (Sec. 4)"),
    beta_1=(1e-4, "first variance (Sec. 4)"), beta_T=(0.02, "last variance (Sec. 4)"),
    objective=(("simple", "vlb"), "L_simple or L (Table 2)"),
    variance=(("large", "small"), "sigma_t^2: beta_t or beta_tilde_t (Sec. 3.2)"),
    clip=(True, "clip x_0_hat to [-1, 1] (released code)"),
    mix_at=(0, "t of task interpolate, 0: T / 2 (Fig. 8)"),
    weights=("", "published weights: google/ddpm-ema-cifar10-32, or diffusers' file or folder"),
    num_test=(256, "test images whose bits/dim are measured"),
)
MNIST = dict(
    image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
    steps=50_000, flip=False, warmup=1000,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": dict(flip=False), "mnist": MNIST, "fashion_mnist": MNIST,
    # Not in the paper: trains in minutes on a laptop. The betas sum to 6, not to 10, as less
    # noise hides an image of 16x16 pixels.
    "digits": dict(
        T=250, beta_1=0.008, beta_T=0.04, variance="small", image_size=(16, 16), channels=16,
        channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(), dropout=0.0, lr=1.2e-2,
        steps=2200, flip=False, warmup=900, lr_decay=3.0, num_samples=64, num_test=16,
        save_every=500,
    ),
}


def preset(args):
    return PRESETS.get(args.dataset, PRESETS["folder"])


def to_float(images):
    return images.float() / 127.5 - 1  # Sec. 3.3


def to_uint8(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def sample(run):
    """Samples; process.png: q(x_t | x_0) of a test image, then x_t and x_0_hat of four samples."""

    def draw(first, n, record):
        x_T = torch.randn(n, run.image_channels, *run.image_size, device=run.device)
        return to_uint8(ddpm_sample(run.model, x_T, *run.sampler, record=record))

    images, record = save_images(draw, run)
    save_grid(images, run.out / "samples.png", columns=8)
    if record:
        t, rows = torch.tensor([0, *record_steps(run.T)], device=run.device), []
        if run.test is not None:
            x_0 = to_float(run.test[:1]).expand(len(record), -1, -1, -1)
            rows.append(q_sample(x_0, t, torch.randn_like(x_0), run.schedule))
        for x_t in torch.stack(record, dim=1)[:4]:  # (16, C, H, W): at the recorded steps, and x_0
            _, _, x_0_hat = p_mean_variance(run.model, x_t[:-1], t[1:].flip(0), *run.sampler)
            rows += [x_t, torch.cat([x_0_hat, x_t[-1:]])]
        save_grid(to_uint8(torch.cat(rows)), run.out / "process.png", columns=len(record))
    return {"n": run.num_samples, "sampler": "Alg. 2", "evaluations": run.T,
            "variance": run.variance, "clip": run.clip}


def bpd(run):
    """The bound on test images, and Table 4: rate and distortion by the number of steps."""
    run.bf16, parts = False, []
    for x_0 in to_float(run.test[: run.num_test]).split(run.sample_batch_size):
        parts.append(bits_per_dim(run.model, x_0, *run.sampler))
    bits = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    n, mean = len(bits["total"]), {key: bits[key].mean().item() for key in ("total", "L_T", "L_0")}
    mean["L_t"] = bits["L_t"].sum(1).mean().item()
    mean["standard_error"] = bits["total"].std().item() / math.sqrt(n)
    print("test bits/dim <= {total:.4f} +- {standard_error:.4f}, of which L_T {L_T:.6f}, L_1 to "
          "L_T-1 {L_t:.4f}, L_0 {L_0:.4f}; ".format(**mean) + f"n = {n}")
    (rate, rmse), table = rate_distortion(bits), []
    for r in sorted({math.ceil(run.T * k / 10) for k in range(1, 11)}, reverse=True):
        table.append((r, rate[r - 1].item(), rmse[r - 1].item()))
        print("{:5d} steps: rate {:.5f} bits/dim, RMSE {:.5f}".format(*table[-1]))
    return {"n": n, "split": "test", "evaluations": run.T, "variance": run.variance,
            "clip": run.clip, "bits_per_dim": mean, "steps_rate_rmse": table}


def interpolation(run):
    x_0, x_0_prime = to_float(run.test[: min(16, len(run.test)) // 2 * 2]).chunk(2)
    fractions = [k / 10 for k in range(11)]
    mixed = interpolate(run.model, x_0, x_0_prime, run.mix_at, fractions, *run.sampler)
    rows = torch.stack([x_0, *mixed, x_0_prime], dim=1)  # (8, 13, C, H, W)
    save_grid(to_uint8(rows.flatten(0, 1)), run.out / "interpolation.png", columns=13)
    return {"n": len(x_0), "split": "test", "t": run.mix_at}


TASKS = {"sample": sample, "bpd": bpd, "interpolate": interpolation}


def main(argv=None):
    with one_line_errors():
        run = read_args(argv, SETTINGS, preset, TASKS, fixed=("T", "beta_1", "beta_T"))
        schedule, run.mix_at = Schedule(run.T, run.beta_1, run.beta_T), run.mix_at or run.T // 2
        if run.mix_at > run.T:
            raise ValueError(f"--mix-at {run.mix_at} is beyond the last step, --T {run.T}")
        setup(run)
        if schedule.alpha_bar[-1] > 0.01:
            print(f"alpha_bar_T = {schedule.alpha_bar[-1]:.2f} leaves data in x_T: multiply "
                  "--beta-1 and --beta-T by 1000 / T, but keep both below 1")
        data = load_data(run)
        net = UNet(run.image_channels, run.image_channels, **run.unet)
        run.model, run.schedule = eps_model(prepare(run, net)), schedule.to(run.device)
        run.sampler = (run.schedule, run.variance, run.clip)
        if data:
            loss = ddpm_loss if run.objective == "simple" else vlb_loss
            fit(net, lambda x: loss(run.model, to_float(x), run.schedule), data[:1], run)
        do_tasks(run, TASKS, also=("bpd",))


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
