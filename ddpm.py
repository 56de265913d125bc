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


@torch.no_grad()
def ddpm_sample(model, x_T, schedule, variance="large", clip=True, t_start=None, callback=None):
    """Alg. 2: x_T ~ N(0, I) -> x_0, like x_T, in T evaluations of the model.
    t_start: begin at this step, with x_T as its x_t. callback(t, x_t) is called with every state,
    from (T, x_T), or (t_start, x_T), to (0, x_0)."""
    callback = (lambda t, x_t: None) if callback is None else callback
    x_t = x_T
    for step in range(schedule.T if t_start is None else t_start, 0, -1):  # Alg. 2, line 2
        callback(step, x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        mean, var, _ = p_mean_variance(model, x_t, t, schedule, variance, clip)
        z = torch.randn_like(x_t) if step > 1 else torch.zeros_like(x_t)  # Alg. 2, line 3
        # (x_t - (1 - alpha_t) / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t) + sigma_t z
        x_t = mean + var.sqrt() * z  # Alg. 2, line 4
    callback(0, x_t)
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

METHOD = "ddpm"  # in checkpoints
FIXED = ("T", "beta_1", "beta_T")  # a checkpoint decides these
READS = {}  # other methods' checkpoints, and settings that these lack
SETTINGS = dict(  # the paper's CIFAR-10 run, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,  # App. B
    num_res_blocks=2, attention_resolutions=[16], dropout=0.1, image_size=[32, 32],  # App. B
    channels=128, channel_mult=[1, 2, 2, 2], warmup=5000, grad_clip=1.0,  # released code
    num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
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
    image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], attention_resolutions=[14],
    steps=50_000, flip=False, warmup=1000,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": dict(flip=False), "mnist": MNIST, "fashion_mnist": MNIST,
    # Not in the paper: trains in minutes on a laptop. The betas sum to 6, not to 10, as less
    # noise hides an image of 16x16 pixels.
    "digits": dict(
        T=250, beta_1=0.008, beta_T=0.04, variance="small", image_size=[16, 16], channels=16,
        channel_mult=[1, 2, 4], num_res_blocks=1, attention_resolutions=[], dropout=0.0, lr=1.2e-2,
        steps=2200, flip=False, warmup=900, lr_decay=3.0, num_samples=64, num_test=16,
        save_every=500,
    ),
}


def preset(args):
    return PRESETS.get(args.dataset, PRESETS["folder"])


def to_float(images):
    return images.float() / 127.5 - 1  # Sec. 3.3


def to_uint8(x):
    if not x.isfinite().all():
        raise ValueError("a sample is not finite")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def draw(args, device, net, schedule, n, callback=None):
    x_T = torch.randn(n, args.image_channels, *args.image_size, device=device)
    return ddpm_sample(eps_model(net), x_T, schedule, args.variance, args.clip, callback=callback)


def sample(args, device, net, schedule):
    net, states = fast(net, args, device), {}
    for first, n in batches(args):
        x_0 = draw(args, device, net, schedule, n, partial(keep, states))
        save_images(to_uint8(x_0), first, args)
    save_pictures(args, states, to_uint8)
    return {"n": args.num_samples, "evaluations": args.T}


def bpd(args, device, net, schedule):
    """The bound on test images, and Table 4: rate and distortion by the number of steps."""
    images, _ = load_images(args, device, args.num_test)
    parts = [bits_per_dim(eps_model(net), x_0, schedule, args.variance, args.clip)
             for x_0 in to_float(images).split(args.sample_batch_size)]
    bits = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    n, names = len(images), ("total", "L_T", "L_t", "L_0")
    mean = {name: bits[name].view(n, -1).sum(1).mean().item() for name in names}
    mean["standard_error"] = round(bits["total"].std().item() / n**0.5, 4) if n > 1 else None
    print("test bits/dim <= {total:.4f} +- {standard_error}, of which L_T {L_T:.6f}, L_1 to L_T-1 "
          "{L_t:.4f}, L_0 {L_0:.4f}; n = {n}".format(n=n, **mean))
    rate, rmse = rate_distortion(bits)
    table = []
    for r in sorted({math.ceil(args.T * k / 10) for k in range(1, 11)}, reverse=True):
        table.append((r, rate[r - 1].item(), rmse[r - 1].item()))
        print("{:5d} steps: rate {:.5f} bits/dim, RMSE {:.5f}".format(*table[-1]))
    return {"n": n, "split": "test", "bits_per_dim": mean, "steps_rate_rmse": table}


def interpolation(args, device, net, schedule):
    x_0 = to_float(load_images(args, device, 16)[0])
    if len(x_0) < 2:
        raise ValueError("task interpolate needs two test images")
    x_0, x_0_prime = x_0[: len(x_0) // 2 * 2].chunk(2)
    model, t = eps_model(fast(net, args, device)), args.mix_at or args.T // 2
    mixed = interpolate(model, x_0, x_0_prime, t, [k / 10 for k in range(11)], schedule,
                        args.variance, args.clip)
    rows = torch.stack([x_0, *mixed, x_0_prime], dim=1)  # (8, 13, C, H, W)
    save_grid(to_uint8(rows.flatten(0, 1)), Path(args.out, "interpolation.png"), columns=13)
    return {"n": len(x_0), "split": "test", "t": t}


TASKS = {"sample": sample, "bpd": bpd, "interpolate": interpolation}


def main(argv=None):
    args, loaded, trains = read_args(argv)
    schedule = Schedule(args.T, args.beta_1, args.beta_T)
    if args.mix_at > args.T:
        raise ValueError(f"--mix-at {args.mix_at} is beyond the last step, --T {args.T}")
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
        loss = ddpm_loss if args.objective == "simple" else vlb_loss
        fit(net, lambda model, x: loss(eps_model(model), to_float(x), schedule), [images], args,
            device, loaded, lambda ema: to_uint8(draw(args, device, ema, schedule, args.preview)))
    else:
        net.load_state_dict(loaded["ema"])
    net.eval().requires_grad_(False)
    do_tasks(args, loaded, trains, TASKS, ("bpd",), device, net, schedule)


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
