"""Score-Based Generative Modeling through Stochastic Differential Equations (Song, Sohl-Dickstein,
Kingma, Kumar, Ermon, Poole 2021, arXiv:2011.13456).

Implements: Eq. (4), (6), (7), (8), (10), (12), (13), (29), (30), (31), (32), (34), (39), (40),
(43), (44), (46), (47), (49); Alg. 1, 4, 5; and NCSNv2's Technique 1.

    t               time, 0 (data) ... 1 (noise, the paper's T)     (B,) float
    x_0             8-bit images scaled linearly                    (B, C, H, W), VE: in [0, 1],
    x               the data at time t                              else in [-1, 1]
    f, g            drift and diffusion of dx = f dt + g dw         like x, (B,)
    z               noise                                           like x, N(0, I)
    N, r            steps of a sampler; its corrector's signal-to-noise ratio, snr
    score(x, t)     s_theta, here -net(x in [-1, 1], 999 t) / std   like x

    python sde.py                                               train on digits, sample, bits/dim
    python sde.py --dataset cifar10 --sde subvp                 the paper's run
    python sde.py --checkpoint runs/sde-digits/checkpoint.pt --predictor ode
    python sde.py --checkpoint runs/ddpm-digits/checkpoint.pt --task bpd    what ddpm.py trained

Measured results stand in README.md. Deviations from the paper and the released code:
1. The network is DDPM's U-Net. For VE, too, it is fed 999 t, which is linear in log sigma. The
   classifier is its first half; the paper's is a Wide ResNet.
2. N + 1 even times lead from 1 to eps; a step's beta_i is beta(t_i) times its length. The released
   code corrects first, and takes 1 / N for steps of another length.
3. Inpainting ends with the denoised mean of all pixels, the ODE without one; released: vice versa.
4. The ODE's error is controlled image by image; VE's loss is a mean over d, not half a sum.
5. The correctors' alpha_i is 1 - beta_i, as released, not Sec. 2.2's product; so for sub-VP, too.
6. A network of ddpm.py is read with beta_min = T beta_1, beta_max = T beta_T, for t from 1 / T,
   where its ODE's samples are denoised.
"""

import math

import torch

# ---- The method ----------------------------------------------------------------------------------


class VE:
    """The variance exploding SDE, NCSN's noise in continuous time. x_0 in [0, 1]; t in (0, 1]."""

    eps, data_range = 1e-5, (0.0, 1.0)  # eps: where sampling ends (App. C)

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma from {sigma_min} to {sigma_max}: not positive and rising")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t  # Eq. (31)

    def drift_diffusion(self, x, t):
        """f like x and g (B,) of dx = f dt + g dw."""
        g = self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), g  # Eq. (30)

    def marginal(self, x_0, t):
        """Mean like x_0 and deviation (B,) of p(x(t) | x_0)."""
        return x_0, self.sigma(t)  # Eq. (31): Eq. (29) with sigma(0) = 0

    def prior(self, shape, device=None):
        """x(1) of this shape."""
        return self.sigma_max * torch.randn(shape, device=device)

    def prior_logp(self, z):
        """log density (B,) of the prior, in nats."""
        return gaussian_logp(z, self.sigma_max)

    def discretize(self, x, t, dt):
        """f like x and G (B,) of the discrete chain's step x(t) = x(t - dt) + f + G z."""
        return torch.zeros_like(x), (self.sigma(t) ** 2 - self.sigma(t - dt) ** 2).sqrt()  # Eq. (8)

    def ancestral(self, x, s, t, dt):
        """Mean like x and deviation (B,) of x(t - dt) given x at t, whose score is s."""
        _, G = self.discretize(x, t, dt)
        return x + expand(G**2, x) * s, G * self.sigma(t - dt) / self.sigma(t)  # Eq. (47)

    def alpha(self, t, dt):
        """What multiplies the corrector's step size at t."""
        return 1.0  # Alg. 4


class VP:
    """The variance preserving SDE, DDPM's noise in continuous time, beta(t) linear. x_0 in [-1, 1].

    Its methods are VE's.
    """

    eps, data_range = 1e-3, (-1.0, 1.0)

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta from {beta_min} to {beta_max}: not positive and rising")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean(self, t):
        """log of the factor of x_0 in x(t): minus half the integral of beta."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def drift_diffusion(self, x, t):
        beta = self.beta(t)
        return -0.5 * expand(beta, x) * x, beta.sqrt()  # Eq. (32)

    def marginal(self, x_0, t):
        log_mean = self.log_mean(t)
        std = (-torch.expm1(2 * log_mean)).sqrt()  # sqrt(1 - mean^2), precise where it is small
        return expand(log_mean.exp(), x_0) * x_0, std  # Eq. (29)

    def prior(self, shape, device=None):
        return torch.randn(shape, device=device)

    def prior_logp(self, z):
        return gaussian_logp(z, 1.0)

    def discretize(self, x, t, dt):
        beta = self.beta(t) * dt  # beta_i
        return expand((1 - beta).sqrt() - 1, x) * x, beta.sqrt()  # Eq. (10)

    def ancestral(self, x, s, t, dt):
        beta = self.beta(t) * dt
        return (x + expand(beta, x) * s) / expand((1 - beta).sqrt(), x), beta.sqrt()  # Eq. (4)

    def alpha(self, t, dt):
        return 1 - self.beta(t) * dt  # of Alg. 5, as released


class SubVP(VP):
    """The sub-VP SDE: VP's mean, at every t less variance. Ancestral sampling is not defined."""

    ancestral = None

    def drift_diffusion(self, x, t):
        f, g = super().drift_diffusion(x, t)
        return f, g * (-torch.expm1(4 * self.log_mean(t))).sqrt()  # Eq. (12)

    def marginal(self, x_0, t):
        mean, std = super().marginal(x_0, t)
        return mean, std**2  # Eq. (34)

    def discretize(self, x, t, dt):
        return euler_maruyama(self, x, t, dt)


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def gaussian_logp(z, std):
    """log N(z; 0, std^2 I) of each z (B, ...), (B,) in nats."""
    z = z.flatten(1) / std
    return -0.5 * z.square().sum(1) - z.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def precise(x):
    """The dtype of times and of the solver's state: float64, which only mps does not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def dsm_loss(score, x_0, sde, t_min=1e-5):
    """The continuous objective with lambda = std^2, t ~ U[t_min, 1]. Scalar: mean over the batch
    and all dimensions, 1 for a score of 0."""
    t = t_min + (1 - t_min) * torch.rand(len(x_0), device=x_0.device)
    z = torch.randn_like(x_0)
    mean, std = sde.marginal(x_0, t)
    s = score(mean + expand(std, x_0) * z, t)
    return (expand(std, x_0) * s + z).square().mean()  # Eq. (7)


# Predictor-corrector samplers, Sec. 4.2

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "probability_flow", "none")
CORRECTORS = ("none", "langevin", "ald")


def euler_maruyama(sde, x, t, dt):
    """f like x and G (B,) of the step x(t) = x(t - dt) + f + G z by the Euler-Maruyama rule, both
    taken at its end, where the reverse step that needs them starts."""
    f, g = sde.drift_diffusion(x, t)
    return f * dt, g * math.sqrt(dt)


def predict(score, sde, x, t, dt, predictor):
    """One step of the reverse SDE, from x at t to t - dt."""
    s = score(x, t.to(x.dtype))
    if predictor == "ancestral":
        mean, std = sde.ancestral(x, s, t, dt)
    else:
        if predictor == "euler_maruyama":
            f, G = euler_maruyama(sde, x, t, dt)
        else:
            f, G = sde.discretize(x, t, dt)
        if predictor == "probability_flow":
            return x - f + 0.5 * expand(G**2, x) * s  # Eq. (43), (44)
        mean, std = x - f + expand(G**2, x) * s, G  # Eq. (46), of Eq. (6)
    return mean + expand(std, x) * torch.randn_like(x)


def correct(score, sde, x, t, dt, corrector, snr):
    """One step of Langevin dynamics at t. "langevin" takes its step size from the norms of noise
    and score, averaged over the batch (App. G); "ald", the released code's annealed Langevin
    dynamics, from the deviation of the noise."""
    z, g = torch.randn_like(x), score(x, t.to(x.dtype))
    if corrector == "langevin":
        size = z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
    else:
        size = sde.marginal(x, t)[1]
    step = 2 * sde.alpha(t, dt) * (snr * size) ** 2  # Alg. 4, 5, line 6
    return x + expand(step, x) * g + expand((2 * step).sqrt(), x) * z  # Alg. 4, 5, line 7


def posterior_mean(score, sde, x, t):
    """E[x_0 | x(t) = x], x without the noise that is left at t (B,)."""
    factor, std = sde.marginal(torch.ones_like(x), t)
    return (x + expand(std**2, x) * score(x, t.to(x.dtype))) / factor  # Tweedie's formula, App. G


def check_sampler(sde, N, predictor, corrector):
    """ValueError for a sampler that is unknown, or that the paper does not define."""
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor is {predictor!r}, not one of {', '.join(PREDICTORS)}")
    if corrector not in CORRECTORS:
        raise ValueError(f"corrector is {corrector!r}, not one of {', '.join(CORRECTORS)}")
    if predictor == corrector == "none":
        raise ValueError("neither a predictor nor a corrector: nothing would move")
    if predictor == "ancestral" and sde.ancestral is None:
        raise ValueError("ancestral sampling is not defined for the sub-VP SDE")
    euler = predictor == "euler_maruyama" or isinstance(sde, SubVP)
    free = euler and corrector == "none"  # of beta_i, which is below 1
    if N < 1 or not free and sde.alpha(1.0, 1 / N) <= 0:
        raise ValueError(f"N = {N} steps are too few: beta(1) / N is not below 1")


@torch.no_grad()
def pc_sample(score, sde, x_T, N=1000, predictor="reverse_diffusion", corrector="langevin",
              snr=0.16, corrector_steps=1, denoise=True, constrain=None, record=None):
    """Alg. 1: x_T ~ sde.prior -> x_0, like x_T.

    N (1 + corrector_steps) evaluations of the score, without those of a "none", and one to denoise.
    predictor, corrector: as of check_sampler. constrain(x, t): what x becomes, at the start and
    after every step. record: a list that gets x at the steps of record_steps, from N down, and x_0.
    """
    check_sampler(sde, N, predictor, corrector)
    dt = (1 - sde.eps) / N
    times = torch.linspace(sde.eps, 1, N + 1, dtype=precise(x_T), device=x_T.device)
    times = times[:, None].expand(-1, len(x_T))  # (N + 1, B), index = the step i
    recorded = () if record is None else record_steps(N)
    constrain = constrain or (lambda x, t: x)
    x = constrain(x_T, times[N])
    for i in range(N, 0, -1):  # Alg. 1, line 2; i is the paper's i + 1
        if i in recorded:
            record.append(x)
        if predictor != "none":
            x = predict(score, sde, x, times[i], dt, predictor)  # Alg. 1, line 3
            x = constrain(x, times[i - 1])
        for _ in range(corrector_steps if corrector != "none" else 0):
            x = correct(score, sde, x, times[i - 1], dt, corrector, snr)  # Alg. 1, line 5
            x = constrain(x, times[i - 1])
    if denoise:
        x = posterior_mean(score, sde, x, times[0])
    if record is not None:
        record.append(x)
    return x


def record_steps(T):
    """The at most 15 evenly spaced steps of 1..T whose states a sampler records, ascending."""
    return sorted({-(-T * k // 15) for k in range(1, 16)})


# The probability flow ODE, Sec. 4.3

STAGES = (  # Dormand, Prince 1980: time of a stage, and the weights of the slopes before it
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),  # the solution of order 5
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # minus order 4


def dormand_prince(slope, y, t_0, t_1, rtol, atol, max_steps=2000):
    """Solve dy/dt = slope(y, t) from t_0 to t_1 -> y at t_1, and the evaluations of slope.

    y (B, ...), t (B,). Every row has a step size of its own, such that the root mean square of
    error / (atol + rtol |y|) stays below 1. ValueError where no step size achieves that.
    """
    t = y.new_full((len(y),), t_0)
    h, end = torch.full_like(t, (t_1 - t_0) / 100), torch.full_like(t, t_1)
    slopes, evaluations = [slope(y, t)], 1
    for _ in range(max_steps):
        last = h.abs() >= (end - t).abs()
        h = torch.where(last, end - t, h)  # 0 for a row that has arrived
        for c, weights in STAGES:
            change = sum(a * k for a, k in zip(weights, slopes, strict=True))
            y_new = y + expand(h, y) * change
            slopes.append(slope(y_new, t + c * h))
        evaluations += len(STAGES)
        error = expand(h, y) * sum(e * k for e, k in zip(ERROR, slopes, strict=True))
        scale = atol + rtol * torch.maximum(y.abs(), y_new.abs())
        norm = (error / scale).square().flatten(1).mean(1).sqrt()  # (B,)
        accept = norm <= 1  # so not for nan
        rows = accept.view(-1, *[1] * (y.dim() - 1))
        y, t = torch.where(rows, y_new, y), torch.where(accept, torch.where(last, end, t + h), t)
        slopes = [torch.where(rows, slopes[-1], slopes[0])]  # the last is the next step's first
        h = h * (0.9 * norm**-0.2).clamp(0.2, 10).nan_to_num(0.2)  # the usual rule for order 5
        under_way = t != end
        if not under_way.any():
            return y, evaluations
        if (under_way & (h.abs() < 1e-12 * abs(t_1 - t_0))).any():
            break
    where = t[under_way][0].item()
    raise ValueError(f"the ODE solver gave up at t = {where:.3g}: the slope is not finite, or too "
                     f"stiff for the tolerances {rtol:g}, {atol:g}")


def probability_flow(score, sde, dtype):
    """drift(x, t) of the ODE whose x(t) has the SDE's densities; score takes this dtype."""

    def drift(x, t):
        f, g = sde.drift_diffusion(x, t)
        s = score(x.to(dtype), t.to(dtype)).to(x.dtype)
        return f - 0.5 * expand(g**2, x) * s  # Eq. (13)

    return drift


@torch.no_grad()
def ode_sample(score, sde, x_T, rtol=1e-5, atol=1e-5, record=None):
    """x_T ~ sde.prior -> x at sde.eps, like x_T, and the evaluations of the score.

    record: a list that gets x at 16 even times from 1 to sde.eps; to stop there costs evaluations.
    """
    drift, x, evaluations = probability_flow(score, sde, x_T.dtype), x_T.to(precise(x_T)), 0
    times = [1.0, sde.eps]
    if record is not None:
        times = torch.linspace(1, sde.eps, 16, dtype=torch.float64).tolist()
        record.append(x_T)
    for t, t_next in zip(times, times[1:], strict=False):
        x, more = dormand_prince(drift, x, t, t_next, rtol, atol)
        evaluations += more
        if record is not None:
            record.append(x.to(x_T.dtype))
    return x.to(x_T.dtype), evaluations


@torch.no_grad()
def ode_encode(score, sde, x_0, rtol=1e-5, atol=1e-5):
    """The latent code x(1) of x_0, taken for x at sde.eps, and the evaluations of the score."""
    drift, x = probability_flow(score, sde, x_0.dtype), x_0.to(precise(x_0))
    x_T, evaluations = dormand_prince(drift, x, sde.eps, 1.0, rtol, atol)
    return x_T.to(x_0.dtype), evaluations


@torch.no_grad()
def log_likelihood(score, sde, x_0, rtol=1e-5, atol=1e-5, probe="rademacher", t_min=1e-5):
    """log p(x_0) in nats, (B,): of the ODE's density at t_min, where x_0 (B, ...) is put.

    probe: "rademacher" or "gaussian" noise for Hutchinson's estimate of the divergence, one draw
    for the whole path; "exact": the full trace, as many back-propagations as x_0 has dimensions.
    """
    if probe == "rademacher":
        probes = torch.randint(0, 2, (1, *x_0.shape), device=x_0.device) * 2.0 - 1
    elif probe == "gaussian":
        probes = torch.randn(1, *x_0.shape, device=x_0.device)
    elif probe == "exact":  # every unit vector
        d = x_0[0].numel()
        probes = torch.eye(d, device=x_0.device).view(d, 1, *x_0.shape[1:])
    else:
        raise ValueError(f"probe is {probe!r}, not 'rademacher', 'gaussian' or 'exact'")
    drift = probability_flow(score, sde, x_0.dtype)

    def slope(y, t):  # of x and, as one more dimension, of the integral of the divergence
        with torch.enable_grad():
            x = y[:, :-1].reshape(x_0.shape).requires_grad_()
            dx = drift(x, t)
            divergence = 0
            for i, v in enumerate(probes.to(x.dtype), 1):  # Eq. (40)
                (vJ,) = torch.autograd.grad((v * dx).sum(), x, retain_graph=i < len(probes))
                divergence = divergence + (v * vJ).flatten(1).sum(1)
        return torch.cat([dx.detach().flatten(1), divergence[:, None]], dim=1)

    y = torch.cat([x_0.flatten(1), x_0.new_zeros(len(x_0), 1)], dim=1).to(precise(x_0))
    y, _ = dormand_prince(slope, y, t_min, 1.0, rtol, atol)
    return sde.prior_logp(y[:, :-1]) + y[:, -1]  # Eq. (39)


def bits_per_dim(score, sde, images, rtol=1e-5, atol=1e-5, probe="rademacher", t_min=1e-5):
    """-log2 p of uint8 images (B, ...) per dimension, (B,): of v + u, u uniform in [0, 1), so that
    the density of 8-bit levels is what is measured, whatever range the data is scaled to."""
    low, high = sde.data_range
    x_0 = low + (high - low) * (images + torch.rand(images.shape, device=images.device)) / 256
    nats = log_likelihood(score, sde, x_0, rtol, atol, probe, t_min)
    return -nats / (x_0[0].numel() * math.log(2)) + math.log2(256 / (high - low))


# Control without retraining, App. I


def guided_score(score, log_prob, scale=1.0):
    """The score given y, for any sampler: log_prob(x, t) -> (B,) is log p(y | x(t)) of a classifier
    that knows the noise; scale 1 is Bayes' rule."""

    def guided(x, t):
        with torch.enable_grad():
            x_y = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x_y, t).sum(), x_y)
        return score(x, t) + scale * gradient  # Eq. (49)

    return guided


def classifier_loss(classifier, x_0, labels, sde, t_min=1e-5):
    """Cross entropy in nats of classifier(x, t) -> logits (B, K), at times t ~ U[t_min, 1]. Its
    weight is the same at every t."""
    t = t_min + (1 - t_min) * torch.rand(len(x_0), device=x_0.device)
    mean, std = sde.marginal(x_0, t)
    x = mean + expand(std, x_0) * torch.randn_like(x_0)
    return torch.nn.functional.cross_entropy(classifier(x, t), labels)  # App. I.1


def inpaint(score, sde, x, mask, x_T, **options):
    """Images like x (B, ...) with x's pixels where mask, 0 or 1, is 1. options: pc_sample's."""

    def constrain(x_t, t):  # the known pixels are drawn anew from p(x(t) | x)
        mean, std = sde.marginal(x, t)
        return x_t * (1 - mask) + (mean + expand(std, x) * torch.randn_like(x)) * mask  # App. I.2

    return pc_sample(score, sde, x_T, constrain=constrain, **options) * (1 - mask) + x * mask


def colorize(score, sde, gray, x_T, **options):
    """Images like x_T (B, 3, H, W) whose channels' mean is gray (B, 1, H, W). options: pc_sample's.

    The paper turns the channels by an orthogonal matrix, whose first row is (1, 1, 1) / sqrt(3),
    and inpaints with the first of them known. Turned back, its noise is the same in all channels.
    """

    def constrain(x_t, t):
        mean, std = sde.marginal(gray, t)
        known = mean + expand(std, gray) / math.sqrt(3) * torch.randn_like(gray)
        return x_t - x_t.mean(1, keepdim=True) + known  # App. I.3

    x_0 = pc_sample(score, sde, x_T, constrain=constrain, **options)
    return x_0 - x_0.mean(1, keepdim=True) + gray


# From NCSNv2 (Song, Ermon 2020), as the paper takes it over in App. C


@torch.no_grad()
def max_pairwise_distance(data):
    """Technique 1, for sigma_1: the largest Euclidean distance of two of data (N, ...)."""
    data = data.flatten(1)
    parts = range(0, len(data), 1000)
    return max(torch.cdist(data[i : i + 1000], data[i:]).max().item() for i in parts)


# ---- Plumbing: word for word the same in all six scripts, and tested to be -----------------------

import argparse
import contextlib
import copy
import datetime
import json
import os
import re
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from unet import UNet

SCRIPT = Path(__file__).stem
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's, 1 without it
RANK, LOCAL_RANK = (int(os.environ.get(k, 0)) * (WORLD > 1) for k in ("RANK", "LOCAL_RANK"))
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
DATASETS = {  # torchvision's class, and where it looks for its files below --data-dir
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw/*-ubyte"),
    "fashion_mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"),
}


def fail(message):
    """End with one line on stderr, what is wrong and what to do, and exit code 2."""
    print(f"{SCRIPT}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors():
    """Bad values, missing or broken files, full disks and full GPUs end without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if re.search("allocate|out of memory|ALLOC_FAILED", str(error)):
            fail("the memory is full: lower --batch-size, --sample-batch-size or --channels")
        if re.search("compiler", str(error), re.IGNORECASE):
            fail("--compile needs a C++ compiler (g++ or clang): install one or leave it out")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def number(kind, low, high=10**9):
    """An argparse type: int or float in [low, high], so neither nan nor inf."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high:g}]")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def base_parser(description, tasks):
    """The flags that every script has; a None below is filled in by the data set's preset."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", None, description, formatter_class=formatter)
    parser.error = fail
    add, count, natural = parser.add_argument, number(int, 1), number(int, 0)
    flag = argparse.BooleanOptionalAction
    add("--dataset", default="digits", help="digits, mnist, fashion_mnist, cifar10 or a folder")
    add("--data-dir", default="data", help="where torchvision downloads to")
    add("--image-size", type=count, nargs="+", help="pixels, N or H W; others are resized")
    add("--task", choices=tasks, default=tasks[0], help="what to do with the trained network")
    add("--out", help="run folder; default runs/SCRIPT-DATASET, or TASK beside the checkpoint")
    add("--checkpoint", help="do not train: take this file's EMA weights and arguments")
    add("--resume", action="store_true", help="go on with the training in the run folder")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of all random numbers")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first there is")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--bf16", action=flag, default=False, help="the network, and only it, in bfloat16")
    add("--steps", type=count, help="training steps in all")
    add("--batch-size", type=count, help="examples a step, all processes together")
    add("--lr", type=number(float, 0, 10), help="Adam's learning rate")
    add("--warmup", type=natural, help="steps in which the learning rate rises to --lr")
    add("--lr-decay", type=number(float, 0, 9), help="p: after the warmup, lr falls as step^-p")
    add("--grad-clip", type=number(float, 0), help="largest norm of the gradient; 0: any")
    add("--ema-decay", type=number(float, 0, 1), help="of the averaged weights; 0: no average")
    add("--flip", action=flag, help="mirror training images at random")
    add("--channels", type=count, help="U-Net: channels of the first level")
    add("--channel-mult", type=count, nargs="+", help="U-Net: channels of each level / those")
    add("--num-res-blocks", type=count, help="U-Net: blocks of a level")
    add("--attention-resolutions", type=count, nargs="*", help="U-Net: pixels of those levels")
    add("--dropout", type=number(float, 0, 0.99), help="U-Net: rate in the residual blocks")
    add("--num-samples", type=count, help="images to sample")
    add("--sample-batch-size", type=count, help="images sampled or tested at a time")
    add("--log-every", type=count, help="steps between the lines of log.jsonl")
    add("--save-every", type=count, help="steps between checkpoints")
    return parser


def read_args(parser, presets, argv=None, methods=(SCRIPT,), fixed=(), variants=()):
    """A flag beats the checkpoint's argument, which beats the preset of the data set. .loaded is
    the checkpoint of --checkpoint or --resume, one of `methods`; `fixed` and the network's flags
    cannot differ from it. A flag in `variants` may change presets: "NAME --FLAG VALUE" is one."""
    argv = sys.argv[1:] if argv is None else argv
    early, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    folder = early.out or f"runs/{SCRIPT}-{Path(early.dataset).resolve().name}"
    if early.checkpoint and early.resume:
        fail("--resume goes on with the run folder's own checkpoint: leave out --checkpoint")
    loaded, inherited, dataset = None, {}, early.dataset
    if early.checkpoint or early.resume:
        path = early.checkpoint or f"{folder}/checkpoint.pt"
        loaded = load_checkpoint(path, methods if early.checkpoint else (SCRIPT,))
        inherited = loaded["args"]
        if loaded["method"] != SCRIPT:  # another method's network: what it is, not how it samples
            shared = (*presets["digits"], *fixed, "dataset", "data_dir", "image_channels")
            inherited = {key: inherited[key] for key in shared if key in inherited}
        dataset = inherited["dataset"]
    name = dataset if dataset in presets else "folder"
    preset = dict(presets[name])
    for flag in variants:
        preset |= presets.get(f"{name} --{flag} {getattr(early, flag)}", {})
    parser.set_defaults(**preset | inherited, loaded=loaded)
    if early.checkpoint and not early.out:
        folder = str(Path(early.checkpoint).parent / early.task)
    parser.set_defaults(out=folder)
    args = parser.parse_args(argv)
    if len(args.image_size) > 2:
        fail("--image-size takes one number, or height and width")
    args.image_size = (args.image_size[0], args.image_size[-1])
    network = ("image_size", "channels", "channel_mult", "num_res_blocks", "attention_resolutions")
    for key in (*network, *fixed) if args.loaded else ():
        trained = args.loaded["args"].get(key)
        if getattr(args, key) == "auto":  # is what it was measured to be
            setattr(args, key, trained)
        if json.dumps(trained) != json.dumps(getattr(args, key)):  # lists and tuples alike
            fail(f"--{key.replace('_', '-')}: the checkpoint was trained with {trained}")
    return args


def setup(args):
    """The device; makes the run folder, joins torchrun's processes, seeds the random numbers."""
    name = args.device
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name} here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    if WORLD > 1 and args.checkpoint:
        raise ValueError("--checkpoint does not train: it takes one process, not torchrun")
    out = Path(args.out)
    if RANK == 0 and not args.resume and out.exists() and any(out.iterdir()):
        resume = "go on with --resume or " if (out / "checkpoint.pt").exists() else ""
        raise ValueError(f"{out} is not empty: {resume}name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        gpu = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {}
        patience = datetime.timedelta(hours=2)  # of the others, while the first one downloads
        dist.init_process_group(**gpu or {"backend": "gloo"}, timeout=patience)
    torch.manual_seed(args.seed + RANK)  # every process draws its own batches and noise
    return device


def load_images(dataset, data_dir, image_size, train):
    """-> images (N, C, H, W) uint8 and labels (N,) int64 of the training or the test split.

    dataset: "digits" (bundled), a name in DATASETS (downloaded to data_dir once), or a folder of
    jpg, png and webp files: greyscale if all are; subfolders are classes; train/ and test/ are the
    splits if both are there, else every tenth file is for testing. image_size: H = W, or (H, W);
    a folder's images are cropped at the centre to that shape, and all are resized to it.
    """
    H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
    if dataset == "digits":  # a sheet of 50 rows of 100; 500 of each class, the last 50 for testing
        sheet = np.array(Image.open(Path(__file__).parent / "assets" / "digits.png"))
        digits = torch.from_numpy(sheet).view(50, 16, 100, 16).transpose(1, 2)
        part = slice(0, 450) if train else slice(450, 500)
        images = digits.reshape(10, 500, 1, 16, 16)[:, part].flatten(0, 1)
        labels = torch.arange(10).repeat_interleave(len(images) // 10)
    elif dataset in DATASETS:
        load, files = DATASETS[dataset]
        if RANK > 0 and dist.is_initialized():
            dist.barrier()  # only the first process downloads
        try:
            data = load(data_dir, train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise OSError(f"cannot download {dataset} ({error}); without a network put its files "
                          f"where torchvision looks: {data_dir}/{files}") from error
        if RANK == 0 and dist.is_initialized():
            dist.barrier()
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    else:
        root, train_and_test = Path(dataset), [Path(dataset, "train"), Path(dataset, "test")]
        if not root.is_dir():
            known = ", ".join(("digits", *DATASETS))
            raise ValueError(f"no data set {dataset}: take {known} or a folder of images")
        is_split = all(folder.is_dir() for folder in train_and_test)
        root = train_and_test[0 if train else 1] if is_split else root
        files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_TYPES)
        if len(files) < (2 if is_split else 20):
            need = "2 are" if is_split else "20, of which every tenth is for testing, are"
            raise ValueError(f"{root} holds {len(files)} jpg, png and webp images: {need} needed")
        files = [f for i, f in enumerate(files) if is_split or (i % 10 != 9) == train]
        parents = [f.relative_to(root).parts[:-1][:1] for f in files]
        classes = {parent: i for i, parent in enumerate(sorted(set(parents)))}
        labels = torch.tensor([classes[parent] for parent in parents])

        def read(file):
            try:
                image = ImageOps.exif_transpose(Image.open(file))
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits")
                image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
                return pil_to_tensor(ImageOps.fit(image, (W, H)))
            except Exception as error:  # whatever a broken file makes a decoder raise
                raise ValueError(f"{file} is no readable 8-bit image: mend or remove it") from error

        with ThreadPoolExecutor() as pool:
            images = list(pool.map(read, files))
        C = max(len(image) for image in images)  # 1 or 3
        images = torch.stack([image.expand(C, H, W) for image in images])
    if images.shape[2:] != (H, W):
        images = resize(images, [H, W], antialias=True)
    return images.contiguous(), labels


def load_split(args, train):
    """The images and labels that the arguments name. The first call says, in args.image_channels,
    what the network takes; ValueError if a later one, or a checkpoint's data, has other images."""
    images, labels = load_images(args.dataset, args.data_dir, args.image_size, train)
    if vars(args).setdefault("image_channels", images.shape[1]) != images.shape[1]:
        raise ValueError(f"{args.dataset}: the network takes {args.image_channels} channels")
    return images, labels


def test_images(args, n):
    """n images (n, C, H, W) uint8 and labels of the test split, the same for one --seed."""
    images, labels = load_split(args, train=False)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:n]
    return images[chosen], labels[chosen]


def test_image(args):
    """One of test_images, (1, C, H, W); None if a checkpoint's data set is not there any more."""
    try:
        return test_images(args, 1)[0]
    except (ValueError, OSError) as error:
        report(f"process.png goes without the forward process: {error}", last=True)


def build_unet(args, in_channels, out_channels, device):
    """The U-Net that the arguments describe; with --checkpoint its EMA weights, in eval mode."""
    shape = (args.channels, args.channel_mult, args.num_res_blocks, args.attention_resolutions)
    net = UNet(in_channels, out_channels, *shape, args.dropout, max(args.image_size))
    if args.checkpoint:
        net.eval().requires_grad_(False).load_state_dict(args.loaded["ema"])
    if args.compile:
        net.compile()
    return net.to(device)


def call(net, args, *inputs):
    """net(*inputs) as float32; with --bf16 the inside of the network runs in bfloat16, but for what
    is measured: a task that measures sets args.bf16 to False."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=args.bf16):
        return net(*inputs).float()


def save_checkpoint(path, state):
    """Write beside path, flush to the disk, rename: path is the old file or the new, never half."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, is the disk full? ({error})") from error


def load_checkpoint(path, methods=(SCRIPT,)):
    """The checkpoint, on the CPU; ValueError if it is missing, damaged or of another method.

    torch.load takes a flipped byte for data, so the archive's checksums are verified first;
    weights_only keeps a hostile file from running code.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            headers = [(r.file_size - r.compress_size, r.external_attr) for r in archive.infolist()]
            if any(map(any, headers)) or archive.testzip() is not None:
                raise ValueError("a size, a flag or a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        method, _, _ = state["method"], state["ema"], dict(state["args"])
    except Exception as error:  # whatever a damaged file makes zipfile and the unpickler raise
        why = "truncated, damaged or not of these scripts"
        raise ValueError(f"cannot read the checkpoint {path}: {why}") from error
    if method not in methods:
        needed = " or ".join(f"{name}.py" for name in methods)
        raise ValueError(f"{path} is a checkpoint of {method}.py: one of {needed} is needed")
    return state


class Loss(nn.Module):
    """loss_fn as the forward of a module that owns the model, for DistributedDataParallel."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.forward = model, loss_fn


def fit(model, loss_fn, data, args):
    """Train to step args.steps, write log.jsonl and checkpoint.pt; leaves the EMA in the model.

    data: a tuple of tensors of one length, of which each step draws rows with replacement (so that
    the random state is the order of the data); loss_fn(*rows): a scalar. Ctrl-C and SIGTERM save.
    """
    if args.batch_size % WORLD:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {WORLD} processes")
    device, log = next(model.parameters()).device, Path(args.out, "log.jsonl")
    data, weights = [part.to(device) for part in data], list(model.parameters())
    optimizer = torch.optim.Adam(weights, args.lr, fused=True)
    step, running = 0, torch.zeros(2, device=device)  # sum and number of the finite losses
    if args.resume:
        model.load_state_dict(args.loaded["model"])
        optimizer.load_state_dict(args.loaded["optimizer"])
        step, running = args.loaded["step"], args.loaded["running"].to(device)
        if step > args.steps:
            raise ValueError(f"--steps {args.steps}: the checkpoint has done {step} already")
    loss_module = Loss(model, loss_fn)
    if WORLD > 1:  # gives all processes the first one's weights, then averages the gradients
        loss_module = nn.parallel.DistributedDataParallel(loss_module)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if args.resume:
        ema.load_state_dict(args.loaded["ema"])
        torch.set_rng_state(args.loaded["rng"])
        if device.type == "cuda" and args.loaded["cuda_rng"] is not None:
            torch.cuda.set_rng_state(args.loaded["cuda_rng"])
        if RANK > 0:  # the checkpoint holds the random state of the first process
            torch.manual_seed(args.seed + RANK + WORLD * step)
        elif log.exists():  # steps after the checkpoint happen again: drop their lines
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            log.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= step))

    model.train()
    signals, stopped, seen, since = [], False, step, time.time()
    stops = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(stop, lambda number, _: signals.append(number)) for stop in stops]
    while step < args.steps and not stopped:
        step += 1
        warm = step / max(1, args.warmup)
        lr = args.lr * min(1, warm, warm**-args.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randint(len(data[0]), (args.batch_size // WORLD,), device=device)
        batch = [part[rows] for part in data]
        if args.flip:
            mirror = torch.rand(len(rows), 1, 1, 1, device=device) < 0.5
            batch[0] = torch.where(mirror, batch[0].flip(-1), batch[0])
        optimizer.zero_grad()
        loss = loss_module(*batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        loss = loss.detach()
        if WORLD > 1:
            dist.all_reduce(loss)
            loss = loss / WORLD
        finite = loss.isfinite() & norm.isfinite()  # a tensor: who looks at it waits for the GPU
        optimizer.found_inf = 1 - finite.float()  # where it is 1, the fused Adam leaves all alone
        optimizer.step()
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), weights, 1 - decay)
        running += torch.where(finite, torch.stack([loss, torch.ones_like(loss)]), 0.0)
        log_now = step == 1 or step % args.log_every == 0
        stopped = bool(signals)
        if WORLD > 1 and log_now:  # all processes decide alike
            status = torch.tensor(float(stopped), device=device)
            dist.all_reduce(status)
            stopped = status.item() > 0
        elif WORLD > 1:
            stopped = False
        if log_now:
            (total, count), norm = running.tolist(), norm.item()
            running.zero_()
            if count == 0 and step > 1:
                fail(f"no finite loss and gradient in the {args.log_every} steps to {step}: lower "
                     f"--lr; the last checkpoint in {args.out}, if any, is from before")
        if RANK == 0 and log_now:
            mean = total / count if count else math.nan
            line = {"step": step, "loss": mean, "grad_norm": norm, "lr": lr}
            line = {key: value if math.isfinite(value) else None for key, value in line.items()}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            pace = (time.time() - since) / (step - seen)  # seconds a step
            left = datetime.timedelta(seconds=round(pace * (args.steps - step)))
            report(f"step {step} of {args.steps}: loss {mean:.4f}, "
                   f"{args.batch_size / pace:.0f} examples/s, {left} left")
            seen, since = step, time.time()
        if RANK == 0 and (step % args.save_every == 0 or step == args.steps or stopped):
            skip = ("loaded", "task", "out", "checkpoint", "resume", "device", "compile")
            state = {
                "method": SCRIPT, "step": step, "running": running,
                "args": {key: value for key, value in vars(args).items() if key not in skip},
                "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            }
            save_checkpoint(Path(args.out, "checkpoint.pt"), state)
    for stop, handler in zip(stops, handlers, strict=True):
        signal.signal(stop, handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if stopped:
        report(f"stopped after step {step}, which is saved: go on with --resume", last=True)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    model.eval().requires_grad_(False).load_state_dict(ema.state_dict())


def report(line, last=False):
    """Print progress: on a terminal as one line that rewrites itself; the first process only."""
    if RANK == 0:
        start, end = ("\r\033[K", "\n" if last else "") if sys.stdout.isatty() else ("", "\n")
        print(start + line, end=end, flush=True)


def save_grid(images, path, columns, labels=()):
    """uint8 images (N, C, H, W) as one PNG, small ones enlarged; labels: a text beside each row."""
    scale = max(1, 48 // images.shape[3])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = to_pil_image(make_grid(images.cpu(), columns, pad_value=96))
    if labels:
        margin, height = 7 * max(map(len, labels)), images.shape[2] + 2
        grid = ImageOps.expand(grid, (margin, 0, 0, 0), "white")
        for row, label in enumerate(labels):
            ImageDraw.Draw(grid).text((6, row * height + height // 2 - 5), label, fill="black")
    grid.save(path)


def save_images(draw, args):
    """draw(n) -> (n, C, H, W) uint8: args.num_samples of them in batches, each written at once as
    images/NNNNNN.png, which FID tools read; returns the first 100."""
    folder, first, done = Path(args.out, "images"), [], 0
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # of the run before --resume
        old.unlink()
    while done < args.num_samples:
        images = draw(min(args.sample_batch_size, args.num_samples - done)).cpu()
        for i, image in enumerate(images):
            to_pil_image(image).save(folder / f"{done + i:06d}.png")
        first, done = [*first, *images][:100], done + len(images)
        report(f"{done} of {args.num_samples} images", last=done == args.num_samples)
    return torch.stack(first)


def save_results(args, task, start, **measured):
    """Add what was measured since `start` to results.json, with what it takes to repeat it."""
    path = Path(args.out, "results.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    context = {"dataset": args.dataset, "seed": args.seed, "seconds": round(time.time() - start, 1)}
    date = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    results[task] = {**measured, **context, **date, "torchvision": torchvision.__version__}
    path.write_text(json.dumps(results, indent=2) + "\n")


def run(args, tasks, net, loss_fn, data, also=(), **settings):
    """Train net on data, unless that is None; then do args.task and, after it has trained for
    `sample`, the tasks `also`. What a task returns stands beside `settings` in results.json."""
    chosen, step = [args.task], args.loaded["step"] if args.checkpoint else args.steps
    if data:
        parameters, shape = sum(p.numel() for p in net.parameters()), list(data[0].shape)
        report(f"{shape} data, {parameters:,} parameters, to {args.out}", last=True)
        start = time.time()
        fit(net, loss_fn, data, args)
        if RANK > 0:
            return
        save_results(args, "train", start, step=step, parameters=parameters, n=shape[0])
        chosen += also if args.task == "sample" else ()
    for task in chosen:
        torch.manual_seed(args.seed)  # the same numbers now and from the checkpoint
        start = time.time()
        measured = {"step": step, "weights": "EMA", **settings, **tasks[task]()}
        save_results(args, task, start, **measured)
    files = ", ".join(sorted(path.name for path in Path(args.out).iterdir()))
    report(f"{args.out} holds {files}", last=True)


# ---- The run -------------------------------------------------------------------------------------

from unet import group_norm, time_embedding

PRESETS = {
    "cifar10": dict(  # App. C, G, H and, for the training, the released code
        beta_min=0.1, beta_max=20.0, sigma_min=0.01, sigma_max=50.0,  # App. C
        predictor="euler_maruyama", num_steps=1000,  # H.2
        corrector="langevin", corrector_steps=1, snr=0.01,  # PC1000 of Tables 1 and 5; H.2: none
        control_snr=0.16, tolerance=1e-5, guidance=1.0,  # Table 5 (VE); App. D.2; Eq. (49)
        image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,  # DDPM's
        attention_resolutions=(16,), dropout=0.1, dequantize=False,
        lr=2e-4, batch_size=128, steps=950_000, ema_decay=0.9999, flip=True,  # App. H
        warmup=5000, grad_clip=1.0, lr_decay=0.0,  # released code
        classifier_steps=100_000, num_samples=100, sample_batch_size=256, num_test=64,  # ours
        log_every=100, save_every=5000,
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(sigma_max="auto", flip=False),
    # Digits are not in the paper: these are ours, sized for minutes on a laptop, an hour on a GPU.
    digits=PRESETS["cifar10"] | dict(
        sigma_max="auto", num_steps=400, corrector_steps=2, snr=0.35, control_snr=0.25,
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(8,), dropout=0.0, dequantize=True, lr=8e-3, batch_size=64,
        steps=3200, warmup=500, lr_decay=1.2, flip=False, classifier_steps=2000, guidance=3.0,
        num_samples=60, num_test=16, save_every=500,
    ),
    mnist=PRESETS["cifar10"] | dict(
        sigma_max="auto", image_size=(28, 28), channels=64, channel_mult=(1, 2, 2),
        attention_resolutions=(14,), dequantize=True, steps=50_000, warmup=1000, flip=False,
        classifier_steps=5000,
    ),
)
PRESETS.update(fashion_mnist=PRESETS["mnist"])
for name in list(PRESETS):
    PRESETS[f"{name} --sde ve"] = dict(  # H.1; Table 5
        predictor="reverse_diffusion", snr=0.16, ema_decay=0.999,
    )


def parse_args(argv=None):
    tasks = ("sample", "samplers", "bpd", "interpolate", "inpaint", "colorize", "train-classifier",
             "class")
    parser = base_parser(__doc__.splitlines()[0], tasks)

    def auto(parse):
        def number_or_auto(text):
            return text if text == "auto" else parse(text)

        return number_or_auto

    add, positive = parser.add_argument, number(float, 1e-12)
    add("--sde", choices=("ve", "vp", "subvp"), default="vp", help="which SDE (Sec. 3.4)")
    add("--beta-min", type=positive, help="beta(0) of VP and sub-VP")
    add("--beta-max", type=positive, help="beta(1) of VP and sub-VP")
    add("--sigma-min", type=positive, help="sigma(0) of VE, in units of [0, 1]")
    add("--sigma-max", type=auto(positive), help="sigma(1) of VE; auto: from the data (App. C)")
    add("--predictor", choices=(*PREDICTORS, "ode"), help="of each step (Table 1); ode: no steps "
        "but the probability flow ODE to --tolerance, without a corrector")
    add("--corrector", choices=CORRECTORS, help="after each step; ald: annealed Langevin dynamics")
    add("--corrector-steps", type=number(int, 1), help="of each of --num-steps (Alg. 1, M)")
    add("--num-steps", type=number(int, 1), help="N, steps of the predictor (Alg. 1)")
    add("--snr", type=positive, help="r of the corrector (Table 5), but see --control-snr")
    add("--control-snr", type=positive, help="r of tasks inpaint, colorize and class")
    add("--tolerance", type=number(float, 1e-10, 1), help="absolute and relative, of the ODE")
    add("--dequantize", action=argparse.BooleanOptionalAction,
        help="train on (v + u) / 256 with u uniform, as bits/dim is measured, not on v / 255")
    add("--num-test", type=number(int, 2), help="test images whose bits/dim are measured")
    add("--classifier", help="checkpoint of task train-classifier; default: beside --checkpoint")
    add("--classifier-steps", type=number(int, 1),
        help="training steps of task train-classifier, in place of --steps")
    add("--guidance", type=number(float, 0), help="of task class; 1: Bayes' rule (App. I.1)")
    parser.set_defaults(classes=0)  # what a classifier's checkpoint has instead
    args = read_args(parser, PRESETS, argv, methods=("sde", "ddpm"), variants=("sde",))
    fixed = ("sde", "beta_min", "beta_max", "sigma_min", "sigma_max")
    for key in fixed if args.loaded else ():
        if getattr(args, key) != parser.get_default(key):
            fail(f"--{key.replace('_', '-')}: the checkpoint has its own")
    if args.loaded and (args.classes > 0) != (args.resume and args.task == "train-classifier"):
        fail("a classifier's checkpoint is for --classifier and for --resume --task "
             "train-classifier --out ITS_FOLDER, a score network's for every other use")
    if args.task in ("train-classifier", "class") and not args.loaded:
        fail(f"--task {args.task} takes the --checkpoint of a score network")
    if args.task == "class" and not args.classifier:
        folder = Path(args.checkpoint).parent if args.checkpoint else Path(args.out)
        args.classifier = str(folder / "train-classifier" / "checkpoint.pt")
    return args


class Classifier(UNet):
    """The U-Net's way down and its middle, then the mean over the pixels: a classifier that knows
    the noise. forward(x (B, C, H, W), t (B,)) -> (B, classes), logits."""

    def __init__(self, in_channels, classes, *shape):
        super().__init__(in_channels, classes, *shape)
        width = self.mid[0].norm1.num_channels
        self.up, self.norm_out = nn.ModuleList(), group_norm(width)
        self.conv_out = nn.Linear(width, classes)

    def forward(self, x, t):
        temb = self.time_mlp(time_embedding(t, self.channels).to(x.dtype))
        h = self.conv_in(x)
        for module in (*self.down, *self.mid):
            h = module(h, temb)
        return self.conv_out(nn.functional.silu(self.norm_out(h)).mean((2, 3)))


def build_classifier(args, device):
    """The classifier that the arguments describe; with --checkpoint its EMA weights, as build_unet.
    """
    shape = (args.channels, args.channel_mult, args.num_res_blocks, args.attention_resolutions)
    net = Classifier(args.image_channels, args.classes, *shape, args.dropout, max(args.image_size))
    if args.checkpoint:
        net.eval().requires_grad_(False).load_state_dict(args.loaded["ema"])
    if args.compile:
        net.compile()
    return net.to(device)


def load_classifier(args, device):
    """The network of --classifier and its number of classes; ValueError unless it was trained for
    the score network's SDE and images."""
    loaded = load_checkpoint(args.classifier)
    theirs = argparse.Namespace(**loaded["args"], checkpoint=args.classifier, loaded=loaded,
                                compile=args.compile)
    if theirs.classes == 0:
        raise ValueError(f"{args.classifier} is no classifier: train one with --task "
                         "train-classifier")
    for key in ("sde", "beta_min", "beta_max", "sigma_min", "sigma_max", "image_channels",
                "image_size"):
        if getattr(theirs, key) != getattr(args, key):
            raise ValueError(f"{args.classifier} was trained with another {key}")
    return build_classifier(theirs, device), theirs.classes


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    device = setup(args)
    of_ddpm = args.loaded["args"] if args.loaded and args.loaded["method"] == "ddpm" else None
    if of_ddpm:  # DDPM is the VP SDE in T steps
        args.beta_min, args.beta_max = (of_ddpm["T"] * of_ddpm[k] for k in ("beta_1", "beta_T"))
    if args.task == "train-classifier":  # the score network's arguments, a network of its own
        args.checkpoint, args.steps = None, args.classifier_steps

    data = None
    if not args.checkpoint:
        images, labels = load_split(args, train=True)
        data = (images,)
        if args.task == "train-classifier":
            data, args.classes = (images, labels), labels.max().item() + 1
            if args.classes < 2:
                raise ValueError(f"{args.dataset} has one class: a subfolder is a class")
        if args.sde == "ve" and args.sigma_max == "auto":
            few = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
            few = few[:10_000] if len(few) > 60_000 else few  # as NCSNv2 does
            args.sigma_max = max_pairwise_distance(images[few].to(device).float() / 255)
    if data or args.task in ("bpd", "interpolate", "inpaint", "colorize"):
        test_images(args, 1)  # what is wrong with them is said now, not after the training
    if args.task == "colorize" and args.image_channels != 3:
        raise ValueError("--task colorize takes colour images")

    if args.sde == "ve":
        sde = VE(args.sigma_min, args.sigma_max)
    else:
        sde = {"vp": VP, "subvp": SubVP}[args.sde](args.beta_min, args.beta_max)
    t_min = 1e-5  # of training and likelihood (App. C)
    if of_ddpm:  # whose first step is t = 1 / T
        sde.eps = t_min = 1 / of_ddpm["T"]
    sampler = {"N": args.num_steps, "predictor": args.predictor, "corrector": args.corrector,
               "snr": args.snr, "corrector_steps": args.corrector_steps}
    if args.task in ("inpaint", "colorize", "class"):
        sampler["snr"] = args.control_snr
    by_ode = args.task == "sample" and args.predictor == "ode"
    if args.predictor == "ode" and args.task in ("inpaint", "colorize", "class"):
        raise ValueError(f"--task {args.task} goes in steps: give it a --predictor other than ode")
    pairs = [(args.predictor, args.corrector)]  # that the task takes
    if args.task == "samplers":  # all, but those that are not defined
        pairs = [(p, c) for p in PREDICTORS for c in CORRECTORS if not p == c == "none"]
        pairs = [pair for pair in pairs if sde.ancestral or pair[0] != "ancestral"]
    if not by_ode and args.task in ("sample", "samplers", "inpaint", "colorize", "class"):
        for pair in pairs:
            check_sampler(sde, args.num_steps, *pair)
    tolerances = {"rtol": args.tolerance, "atol": args.tolerance}
    low, high = sde.data_range

    def to_float(images):
        return low + (high - low) * images.to(device).float() / 255

    def dequantized(images):
        images = images.to(device).float()
        return low + (high - low) * (images + torch.rand_like(images)) / 256

    def to_uint8(x):
        return ((x - low) / (high - low) * 256).clamp(0, 255).to(torch.uint8)

    def centred(x):
        return 2 * (x - low) / (high - low) - 1

    def score(x, t):
        calls.append(1)
        label = of_ddpm["T"] * t - 1 if of_ddpm else 999 * t
        return -call(net, args, centred(x), label) / expand(sde.marginal(x, t)[1], x)

    def classify(network, x, t):
        return call(network, args, centred(x), 999 * t)

    def loss_fn(images, labels=None):
        x_0 = dequantized(images) if args.dequantize else to_float(images)
        if labels is None:
            return dsm_loss(score, x_0, sde)
        return classifier_loss(lambda x, t: classify(net, x, t), x_0, labels, sde)

    if args.task == "train-classifier":
        net = build_classifier(args, device)
    else:
        net = build_unet(args, args.image_channels, args.image_channels, device)
    if args.task == "class":
        classifier, classes = load_classifier(args, device)
    calls = []  # one entry for each evaluation of the score

    def prior(n):
        return sde.prior((n, args.image_channels, *args.image_size), device)

    def flow(x_T):
        args.bf16 = False  # its precision is below the solver's tolerance
        x, _ = ode_sample(score, sde, x_T, **tolerances)
        if of_ddpm:  # as the last step of its own chain: at t = 1 / T the noise can be seen
            x = posterior_mean(score, sde, x, torch.full((len(x),), sde.eps, device=device))
        return x

    def sample():
        record = []

        def draw(n):
            calls.clear()
            states = None if record else record
            if by_ode:
                args.bf16, x_T = False, prior(n)
                if states is not None:  # its stops are no evaluations of the samples
                    ode_sample(score, sde, x_T[:8], **tolerances, record=states)
                    calls.clear()
                return to_uint8(flow(x_T))
            return to_uint8(pc_sample(score, sde, prior(n), **sampler, record=states))

        save_grid(save_images(draw, args), Path(args.out, "samples.png"), columns=10)
        rows, image = [*torch.stack(record, dim=1)[:8]], test_image(args)
        if image is not None:  # at the recorded times, and at 0
            N = 15 if by_ode else args.num_steps
            steps = torch.tensor([0, *record_steps(N)], device=device)
            t = sde.eps + (1 - sde.eps) * steps / N
            mean, std = sde.marginal(to_float(image).expand(len(t), -1, -1, -1), t)
            rows.insert(0, mean + expand(std, mean) * torch.randn_like(mean))
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "process.png"), columns=len(record))
        how = {"predictor": "ode"} | tolerances if by_ode else sampler
        return {"n": args.num_samples, **how, "evaluations": len(calls)}

    def samplers():
        x_T, rows, table = prior(10), [], []
        for predictor, corrector in [*pairs, ("ode", "none")]:
            torch.manual_seed(args.seed + 1)  # in each row the same noise, and not x_T
            calls.clear()
            start = time.time()
            options = sampler | {"predictor": predictor, "corrector": corrector}
            if predictor == "none":  # Table 1, C2000, and Table 5
                options |= {"corrector_steps": 2, "snr": 0.22 if args.sde == "ve" else 0.27}
            if predictor == "ode":
                x_0 = flow(x_T)
            else:
                x_0 = pc_sample(score, sde, x_T, **options)
            rows.append(to_uint8(x_0))
            seconds = round(time.time() - start, 1)
            table.append({"predictor": predictor, "corrector": corrector, "snr": options["snr"],
                          "corrector_steps": options["corrector_steps"],
                          "evaluations": len(calls), "seconds": seconds})
            line = "{predictor}, {corrector}: {evaluations} evaluations, {seconds} s"
            report(line.format(**table[-1]), last=True)
        labels = [line.format(**row) for row in table]
        save_grid(torch.cat(rows), Path(args.out, "samplers.png"), columns=10, labels=labels)
        return {"n": len(x_T), **sampler, **tolerances, "table": table}

    def bpd():
        args.bf16 = False
        calls.clear()
        batches = test_images(args, args.num_test)[0].split(args.sample_batch_size)
        bits = [bits_per_dim(score, sde, images.to(device), **tolerances, t_min=t_min)
                for images in batches]
        bits = torch.cat(bits).cpu()
        mean, error = bits.mean().item(), bits.std().item() / math.sqrt(len(bits))
        report(f"test bits/dim {mean:.4f} +- {error:.4f}: density of the ODE at t = {t_min:g}, "
               f"images uniformly dequantised; n = {len(bits)}", last=True)
        return {"n": len(bits), "split": "test", "bits_per_dim": mean, "standard_error": error,
                "is": "density of the ODE at t_min, no bound; images uniformly dequantised; one "
                "Rademacher probe each", "t_min": t_min, "evaluations": len(calls), **tolerances}

    def interpolate():
        args.bf16 = False
        calls.clear()
        x_0 = to_float(test_images(args, 16)[0])
        x_0 = x_0[: len(x_0) // 2 * 2]
        z, z_prime = ode_encode(score, sde, x_0, **tolerances)[0].chunk(2)
        # spherical (Fig. 6), as z and z_prime are nearly orthogonal and of one length
        angles = [k / 10 * math.pi / 2 for k in range(11)]
        mixed = torch.stack([math.cos(a) * z + math.sin(a) * z_prime for a in angles], dim=1)
        parts = mixed.flatten(0, 1).split(args.sample_batch_size)  # of (8 * 11, C, H, W)
        x = torch.cat([ode_sample(score, sde, part, **tolerances)[0] for part in parts])
        x = x.view_as(mixed)
        ends = [half[:, None] for half in x_0.chunk(2)]
        rows = torch.cat([ends[0], x, ends[1]], dim=1)  # (8, 13, C, H, W)
        save_grid(to_uint8(rows.flatten(0, 1)), Path(args.out, "interpolation.png"), columns=13)
        error = (torch.cat([x[:, 0], x[:, -1]]) - x_0).abs().max().item()
        report(f"decoded codes differ from their images by at most {error:.1e}", last=True)
        return {"n": len(z), "split": "test", "largest_error": error, "evaluations": len(calls),
                **tolerances}

    def inpainting():
        calls.clear()
        x, (H, W) = to_float(test_images(args, 4)[0]), args.image_size
        masks, rows = x.new_ones(3, 1, 1, H, W), []
        masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0  # left, right half missing
        masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0  # the centre
        for mask in masks:
            known = x.repeat(6, 1, 1, 1)  # six completions of each
            filled = inpaint(score, sde, known, mask, prior(len(known)), **sampler)
            grey = (low + high) / 2 * (1 - mask)
            parts = [x * mask + grey, *filled.chunk(6), x]
            rows.append(torch.stack(parts, dim=1).flatten(0, 1))  # image by image
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "inpainting.png"), columns=8)
        return {"n": len(x), "split": "test", "completions": 6, **sampler,
                "evaluations": len(calls)}

    def colorization():
        calls.clear()
        x = to_float(test_images(args, 8)[0])
        gray = x.mean(1, keepdim=True)
        known = gray.repeat(6, 1, 1, 1)  # six of each
        colored = colorize(score, sde, known, prior(len(known)), **sampler)
        parts = [gray.expand_as(x), *colored.chunk(6), x]
        rows = torch.stack(parts, dim=1).flatten(0, 1)  # image by image
        save_grid(to_uint8(rows), Path(args.out, "colorization.png"), columns=8)
        return {"n": len(x), "split": "test", "completions": 6, **sampler,
                "evaluations": len(calls)}

    def accuracy():
        images, labels = test_images(args, 1000)
        x_0, labels, table = to_float(images), labels.to(device), []
        for t in (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7):  # Fig. 13, there by sigma
            times = torch.full((len(x_0),), t, device=device)
            mean, std = sde.marginal(x_0, times)
            x = mean + expand(std, x_0) * torch.randn_like(x_0)
            parts = zip(x.split(args.sample_batch_size), times.split(args.sample_batch_size),
                        strict=True)
            guess = torch.cat([classify(net, *part) for part in parts]).argmax(1)
            table.append((t, (guess == labels).float().mean().item()))
            report("t = {:g}: accuracy {:.3f}".format(*table[-1]), last=True)
        return {"n": len(x_0), "split": "test", "t_accuracy": table, "classes": args.classes}

    def class_conditional():
        labels = torch.arange(classes, device=device)
        args.num_samples = classes * -(-args.num_samples // classes)  # as many of each
        drawn = [0]

        def draw(n):  # image i is of class i mod classes
            calls.clear()
            wanted = labels[(drawn[0] + torch.arange(n, device=device)) % classes]
            drawn[0] += n

            def log_prob(x, t):
                return classify(classifier, x, t).log_softmax(1).gather(1, wanted[:, None])[:, 0]

            guided = guided_score(score, log_prob, args.guidance)
            return to_uint8(pc_sample(guided, sde, prior(n), **sampler))

        first = save_images(draw, args)
        columns = max(1, len(first) // classes)
        rows = [first[k::classes][:columns] for k in range(min(classes, len(first)))]
        save_grid(torch.cat(rows), Path(args.out, "classes.png"), columns)
        return {"n": args.num_samples, "class": f"image i is of class i mod {classes}",
                "guidance": args.guidance, **sampler, "evaluations": len(calls)}

    tasks = {"sample": sample, "samplers": samplers, "bpd": bpd, "interpolate": interpolate,
             "inpaint": inpainting, "colorize": colorization, "train-classifier": accuracy,
             "class": class_conditional}
    run(args, tasks, net, loss_fn, data, also=("bpd",), sde=args.sde)


if __name__ == "__main__":
    main()
