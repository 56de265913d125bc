"""Score-Based Generative Modeling through Stochastic Differential Equations (Song, Sohl-Dickstein,
Kingma, Kumar, Ermon, Poole 2021, arXiv:2011.13456).

Implements: Eq. (4), (5), (6), (7), (8), (9), (10), (11), (12), (13), (29), (30), (31), (32), (33),
(34), (39), (40), (43), (44), (46), (47), (49); Alg. 1, 4, 5; Fig. 6; and NCSNv2's Technique 1.

    t               time, 0 (data) ... 1 (noise, the paper's T)     (B,) float
    x_0             8-bit images, VE: in [0, 1], else [-1, 1]       (B, C, H, W)
    x               the data at time t                              like x_0
    f, g, z         dx = f dt + g dw; standard normal noise         like x, (B,), like x
    N, r            steps of a sampler; its corrector's signal-to-noise ratio, snr
    score(x, t)     s_theta, here -net(x in [-1, 1], 999 t) / std   like x

    python sde.py                                               train on digits, sample, bits/dim
    python sde.py --dataset cifar10 --sde subvp                 the paper's run
    python sde.py --checkpoint runs/sde-digits/checkpoint.pt --predictor ode
    python sde.py --checkpoint runs/ddpm-digits/checkpoint.pt --task bpd    what ddpm.py trained

README.md has measured results. Deviations from the paper and the released code:
1. On CIFAR-10 the networks are the paper's, elsewhere DDPM's U-Net, which takes 999 t for VE, too:
   this is linear in log sigma. The classifier is the U-Net's first half, not a Wide ResNet.
2. N + 1 evenly spaced times lead from 1 to eps; beta_i is beta(t_i) times the step's length. The
   released code corrects first, and its step 1 / N is not the spacing of its times.
3. Inpainting ends by denoising all pixels, the ODE without denoising; released: the reverse.
4. The ODE's error is controlled image by image; VE's loss is a mean over d, not half a sum.
5. The correctors' alpha_i is 1 - beta_i, as released, not Sec. 2.2's product; also for sub-VP.
6. A network of ddpm.py has beta_min = T beta_1, beta_max = T beta_T; its samples end at t = 1 / T.
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
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from unet import UNet, ddpm_plus_plus, group_norm, ncsn_plus_plus, published, time_embedding

# ---- The method ----------------------------------------------------------------------------------


class SDE:
    """dx = f dt + g dw, Eq. (5), from data at t = 0 to the prior at t = 1, N(0, prior_std^2 I)."""

    def prior(self, shape, device=None):
        return self.prior_std * torch.randn(shape, device=device)

    def prior_logp(self, z):
        """log density (B,) of the prior at z (B, ...), in nats."""
        squares = (z.flatten(1) / self.prior_std).square().sum(1)
        return -0.5 * squares - z[0].numel() * math.log(self.prior_std * math.sqrt(2 * math.pi))


class VE(SDE):
    """The variance exploding SDE, NCSN's noise in continuous time. x_0 in [0, 1]; t in (0, 1]."""

    eps, data_range = 1e-5, (0.0, 1.0)  # eps: where sampling ends (App. C)

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma from {sigma_min} to {sigma_max} must be positive and rise")
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t  # Eq. (31)

    def beta(self, t):
        return 0.0  # so that the corrector's alpha is 1 in Alg. 4

    def drift_diffusion(self, x, t):
        """f like x and g (B,) of dx = f dt + g dw."""
        g = self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), g  # Eq. (9), (30)

    def marginal(self, x_0, t):
        """Mean like x_0 and deviation (B,) of p(x(t) | x_0)."""
        return x_0, self.sigma(t)  # Eq. (31): Eq. (29) with sigma(0) = 0

    def discretize(self, x, t, dt):
        """f like x and G (B,) of the discrete chain's step x(t) = x(t - dt) + f + G z."""
        return torch.zeros_like(x), (self.sigma(t) ** 2 - self.sigma(t - dt) ** 2).sqrt()  # Eq. (8)

    def ancestral(self, x, s, t, dt):
        """Mean like x and deviation (B,) of x(t - dt) given x at t, whose score is s."""
        _, G = self.discretize(x, t, dt)
        return x + expand(G**2, x) * s, G * self.sigma(t - dt) / self.sigma(t)  # Eq. (47)


class VP(SDE):
    """The variance preserving SDE: DDPM's noise in continuous time, beta(t) linear. x_0 in [-1, 1].
    Its methods return what VE's do."""

    data_range, prior_std = (-1.0, 1.0), 1.0

    def __init__(self, beta_min=0.1, beta_max=20.0, eps=1e-3):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta from {beta_min} to {beta_max} must be positive and not fall")
        self.beta_min, self.beta_max, self.eps = beta_min, beta_max, eps

    def beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean(self, t):
        """log of the factor of x_0 in x(t): minus half the integral of beta."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min  # Eq. (33)

    def drift_diffusion(self, x, t):
        beta = self.beta(t)
        return -0.5 * expand(beta, x) * x, beta.sqrt()  # Eq. (11), (32)

    def marginal(self, x_0, t):
        log_mean = self.log_mean(t)
        std = (-torch.expm1(2 * log_mean)).sqrt()  # sqrt(1 - mean^2), precise where it is small
        return expand(log_mean.exp(), x_0) * x_0, std  # Eq. (29)

    def discretize(self, x, t, dt):
        beta = self.beta(t) * dt  # beta_i
        return expand((1 - beta).sqrt() - 1, x) * x, beta.sqrt()  # Eq. (10)

    def ancestral(self, x, s, t, dt):
        beta = self.beta(t) * dt
        return (x + expand(beta, x) * s) / expand((1 - beta).sqrt(), x), beta.sqrt()  # Eq. (4)


def euler_maruyama(sde, x, t, dt):
    """f like x and G (B,) of x(t) = x(t - dt) + f + G z, both evaluated at t, where the reverse
    step begins."""
    f, g = sde.drift_diffusion(x, t)
    return f * dt, g * math.sqrt(dt)


class SubVP(VP):
    """The sub-VP SDE: VP's mean with a variance below VP's. Ancestral sampling is not defined."""

    ancestral, discretize = None, euler_maruyama

    def drift_diffusion(self, x, t):
        f, g = super().drift_diffusion(x, t)
        return f, g * (-torch.expm1(4 * self.log_mean(t))).sqrt()  # Eq. (12)

    def marginal(self, x_0, t):
        mean, std = super().marginal(x_0, t)
        return mean, std**2  # Eq. (34)


def precision(device):
    """The dtype of tables: float64, which only mps lacks."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def score_model(net, sde, T=None, log_sigma=False):
    """s_theta(x, t) from a network of images in [-1, 1] and a time. It predicts the noise and takes
    999 t, or T t - 1 if it is ddpm.py's with T steps. log_sigma: NCSN++ takes log sigma(t), and
    its output / sigma(t) is the score (App. H)."""
    low, high = sde.data_range

    def score(x, t):
        std, centred = sde.marginal(x, t)[1], 2 * (x - low) / (high - low) - 1
        if log_sigma:
            return net(centred, std.log()) / expand(std, x)
        return -net(centred, T * t - 1 if T else 999 * t) / expand(std, x)

    return score


def ddpm_process(T, beta_1, beta_T):
    """The VP SDE that DDPM discretises in T steps. Its first step, t = 1 / T, is where sampling
    and likelihood end (App. B)."""
    return VP(T * beta_1, T * beta_T, eps=1 / T)


def perturb(x_0, t, sde):
    """x(t) of x_0 (B, ...), drawn from p(x(t) | x_0); t (B,)."""
    mean, std = sde.marginal(x_0, t)
    return mean + expand(std, x_0) * torch.randn_like(x_0)


def dsm_loss(score, x_0, sde, t_min=1e-5):
    """The continuous objective with lambda = std^2, t ~ U[t_min, 1]. Scalar: mean over the batch
    and all dimensions, 1 for a score of 0."""
    t = t_min + (1 - t_min) * torch.rand(len(x_0), device=x_0.device)
    z = torch.randn_like(x_0)
    mean, std = sde.marginal(x_0, t)
    s = score(mean + expand(std, x_0) * z, t)
    # std^2 |s - grad log p(x(t) | x_0)|^2, whose gradient is -z / std
    return (expand(std, x_0) * s + z).square().mean()  # Eq. (7)


PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "probability_flow", "none")
CORRECTORS = ("none", "langevin", "ald")


def predict(score, sde, x, t, dt, predictor):
    """One step of the reverse SDE, from x at t to t - dt."""
    s = score(x, t.to(x.dtype))
    euler = predictor == "euler_maruyama"
    f, G = euler_maruyama(sde, x, t, dt) if euler else sde.discretize(x, t, dt)
    if predictor == "probability_flow":
        return x - f + 0.5 * expand(G**2, x) * s  # Eq. (43), (44)
    mean, std = x - f + expand(G**2, x) * s, G  # Eq. (46), of Eq. (6)
    if predictor == "ancestral":
        mean, std = sde.ancestral(x, s, t, dt)
    return mean + expand(std, x) * torch.randn_like(x)


def correct(score, sde, x, t, dt, corrector, snr):
    """One step of Langevin dynamics at t. "langevin" sets its size by the batch's mean norms of
    noise and score (App. G), "ald" by the noise's deviation at t (as released)."""
    # g is the score here, as in Alg. 4 and 5
    z, g, size = torch.randn_like(x), score(x, t.to(x.dtype)), sde.marginal(x, t)[1]
    if corrector == "langevin":
        size = z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()
    alpha = 1 - sde.beta(t) * dt  # as released
    step = 2 * alpha * (snr * size) ** 2  # Alg. 4, 5, line 6
    return x + expand(step, x) * g + expand((2 * step).sqrt(), x) * z  # Alg. 4, 5, line 7


def posterior_mean(score, sde, x, t):
    """E[x_0 | x(t) = x], x without the noise that is left at t (B,)."""
    factor, std = sde.marginal(torch.ones_like(x), t)
    return (x + expand(std**2, x) * score(x, t.to(x.dtype))) / factor  # Tweedie's formula, App. G


def check_sampler(sde, N, predictor, corrector):
    """ValueError for a sampler that is unknown, or that the paper does not define."""
    if predictor not in PREDICTORS or corrector not in CORRECTORS:
        raise ValueError(f"predictor {predictor!r} is not one of {', '.join(PREDICTORS)}, or "
                         f"corrector {corrector!r} is not one of {', '.join(CORRECTORS)}")
    if predictor == corrector == "none":
        raise ValueError("neither a predictor nor a corrector: nothing would move")
    if predictor == "ancestral" and sde.ancestral is None:
        raise ValueError("ancestral sampling is not defined for the sub-VP SDE")
    euler = predictor == "euler_maruyama" or isinstance(sde, SubVP)
    free = euler and corrector == "none"  # these never use 1 - beta_i, which must be positive
    if N < 1 or not free and sde.beta(1.0) >= N:
        raise ValueError(f"N = {N} steps are too few: beta(1) / N is not below 1")


@torch.no_grad()
def pc_sample(score, sde, x_T, N=1000, predictor="reverse_diffusion", corrector="langevin",
              snr=0.16, corrector_steps=1, denoise=True, constrain=None, record=None):
    """Alg. 1: x_T ~ sde.prior -> x_0, like x_T.
    N (1 + corrector_steps) evaluations of the score, fewer with a "none", and one to denoise.
    constrain(x, t) replaces x, at the start and after every step. record: a list that gets x
    at the steps of record_steps, from N down, and x_0. ValueError: see check_sampler."""
    check_sampler(sde, N, predictor, corrector)
    dt = (1 - sde.eps) / N
    times = torch.linspace(sde.eps, 1, N + 1, dtype=precision(x_T.device), device=x_T.device)
    times = times[:, None].expand(-1, len(x_T))  # (N + 1, B), index = the step i
    recorded = () if record is None else record_steps(N)
    constrain = constrain or (lambda x, t: x)
    x = constrain(x_T, times[N])
    for i in range(N, 0, -1):  # Alg. 1, line 2; i is the paper's i + 1
        if i in recorded:
            record.append(x)
        t, t_next = times[i], times[i - 1]
        if predictor != "none":
            x = constrain(predict(score, sde, x, t, dt, predictor), t_next)  # Alg. 1, line 3
        for _ in range(corrector_steps if corrector != "none" else 0):
            x = correct(score, sde, x, t_next, dt, corrector, snr)  # Alg. 1, line 5
            x = constrain(x, t_next)
    if denoise:
        x = posterior_mean(score, sde, x, times[0])
    if record is not None:
        record.append(x)
    return x


def record_steps(T):
    """At most 15 evenly spaced steps of 1..T, ascending: a sampler records its states there."""
    return sorted({math.ceil(T * k / 15) for k in range(1, 16)})


def probability_flow(score, sde, dtype):
    """drift(x, t) of the ODE whose x(t) has the densities of the SDE; score takes this dtype."""

    def drift(x, t):
        f, g = sde.drift_diffusion(x, t)
        s = score(x.to(dtype), t.to(dtype)).to(x.dtype)
        return f - 0.5 * expand(g**2, x) * s  # Eq. (13)

    return drift


@torch.no_grad()
def ode_sample(score, sde, x_T, rtol=1e-5, atol=1e-5, record=None):
    """x_T ~ sde.prior -> x at sde.eps, like x_T, and the evaluations of the score. record: a list
    that gets x at 16 evenly spaced times from 1 to sde.eps, which costs evaluations."""
    drift, evaluations, states = probability_flow(score, sde, x_T.dtype), 0, [x_T]
    x, stops = x_T.to(precision(x_T.device)), 2 if record is None else 16
    for t, t_next in pairwise(torch.linspace(1, sde.eps, stops, dtype=torch.float64).tolist()):
        x, more = dormand_prince(drift, x, t, t_next, rtol, atol)
        evaluations += more
        states.append(x.to(x_T.dtype))
    if record is not None:
        record += states
    return states[-1], evaluations


@torch.no_grad()
def ode_encode(score, sde, x_0, rtol=1e-5, atol=1e-5):
    """The latent code x(1) of x_0, taken as x at sde.eps, and the evaluations of the score."""
    drift, x = probability_flow(score, sde, x_0.dtype), x_0.to(precision(x_0.device))
    x_T, evaluations = dormand_prince(drift, x, sde.eps, 1.0, rtol, atol)
    return x_T.to(x_0.dtype), evaluations


@torch.no_grad()
def log_likelihood(score, sde, x_0, rtol=1e-5, atol=1e-5, probe="rademacher", t_min=1e-5):
    """log p(x_0) in nats, (B,), by the ODE's density at t_min of x_0 (B, ...). probe: "rademacher"
    or "gaussian" noise for Hutchinson's estimate of the divergence, one draw for the whole path;
    "exact": its trace, one back-propagation for each dimension of x_0."""
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

    y = torch.cat([x_0.flatten(1), x_0.new_zeros(len(x_0), 1)], dim=1).to(precision(x_0.device))
    y, _ = dormand_prince(slope, y, t_min, 1.0, rtol, atol)
    return sde.prior_logp(y[:, :-1]) + y[:, -1]  # Eq. (39)


def dequantize(images, sde):
    """uint8 images v as (v + u) / 256, u uniform in [0, 1), scaled to the data's range."""
    low, high = sde.data_range
    return low + (high - low) * (images + torch.rand(images.shape, device=images.device)) / 256


def bits_per_dim(score, sde, images, rtol=1e-5, atol=1e-5, probe="rademacher", t_min=1e-5):
    """-log2 p of uint8 images (B, ...) per dimension, (B,): the density of dequantised levels."""
    (low, high), x_0 = sde.data_range, dequantize(images, sde)
    nats = log_likelihood(score, sde, x_0, rtol, atol, probe, t_min)
    return -nats / (x_0[0].numel() * math.log(2)) + math.log2(256 / (high - low))


def slerp_orthogonal(z, z_prime, fraction):
    """Spherical interpolation of codes from z to z_prime, like both. Two codes are nearly
    orthogonal and of one length, so the angle between them is taken to be pi / 2 (Fig. 6)."""
    angle = fraction * math.pi / 2
    return math.cos(angle) * z + math.sin(angle) * z_prime


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
    """Solve dy/dt = slope(y, t) from t_0 to t_1 -> y at t_1, and the evaluations of slope; y
    (B, ...), t (B,). Every row has a step size of its own, such that the root mean square of
    error / (atol + rtol |y|) stays below 1. ValueError where no step size achieves that."""
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
        if (t == end).all():
            return y, evaluations
        if ((t != end) & (h.abs() < 1e-12 * abs(t_1 - t_0))).any():
            break
    raise ValueError(f"the ODE solver gave up at t = {t[t != end][0].item():.3g}: the slope is not "
                     f"finite, or too stiff for the tolerances {rtol:g}, {atol:g}")


def guided_score(score, log_prob, scale=1.0):
    """The score given y, for any sampler: log_prob(x, t) -> (B,) is log p(y | x(t)) of a classifier
    that knows the noise; scale 1 is Bayes' rule."""

    def guided(x, t):
        with torch.enable_grad():
            x_y = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x_y, t).sum(), x_y)
        return score(x, t) + scale * gradient  # Eq. (49)

    return guided


def classifier_model(net, sde):
    """classifier(x, t) -> logits (B, K), from a network of images in [-1, 1] that takes 999 t."""
    low, high = sde.data_range
    return lambda x, t: net(2 * (x - low) / (high - low) - 1, 999 * t)


def class_log_prob(classifier, labels):
    """log_prob(x, t) -> (B,): log p(y | x(t)) of each image's label y in labels (B,)."""
    return lambda x, t: classifier(x, t).log_softmax(1).gather(1, labels[:, None])[:, 0]


def classifier_loss(classifier, x_0, labels, sde, t_min=1e-5):
    """Cross entropy in nats of classifier(x, t) -> logits (B, K), mean over t ~ U[t_min, 1]."""
    t = t_min + (1 - t_min) * torch.rand(len(x_0), device=x_0.device)
    logits = classifier(perturb(x_0, t, sde), t)
    return torch.nn.functional.cross_entropy(logits, labels)  # App. I.1


def inpaint(score, sde, x, mask, x_T, **options):
    """Images like x (B, ...) with x's pixels where mask, 0 or 1, is 1. options: pc_sample's."""

    def constrain(x_t, t):  # the known pixels are drawn anew
        return x_t * (1 - mask) + perturb(x, t, sde) * mask  # App. I.2

    return pc_sample(score, sde, x_T, constrain=constrain, **options) * (1 - mask) + x * mask


def colorize(score, sde, gray, x_T, **options):
    """Images like x_T (B, 3, H, W) whose channels' mean is gray (B, 1, H, W). options: pc_sample's.
    The paper turns the channels by an orthogonal matrix, whose first row is (1, 1, 1) / sqrt(3),
    and inpaints with the first one known. Turned back, its noise is the same in all channels."""

    def constrain(x_t, t):
        mean, std = sde.marginal(gray, t)
        known = mean + expand(std, gray) / math.sqrt(3) * torch.randn_like(gray)
        return x_t - x_t.mean(1, keepdim=True) + known  # App. I.3

    x_0 = pc_sample(score, sde, x_T, constrain=constrain, **options)
    return x_0 - x_0.mean(1, keepdim=True) + gray


def max_pairwise_distance(data):
    """Technique 1, for sigma_1: the largest Euclidean distance between two of data (N, ...)."""
    parts = data.flatten(1).split(1000)  # so that only a few at a time become floats
    pairs = ((a, b) for i, a in enumerate(parts) for b in parts[i:])
    return max(torch.cdist(a.float(), b.float()).max().item() for a, b in pairs)


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # CIFAR-10, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=950_000, flip=True,  # App. H
    image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,  # DDPM's
    attention_resolutions=(16,), dropout=0.1, warmup=5000, grad_clip=1.0,  # released code
    lr_decay=0.0, num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
    sde=(("vp", "ve", "subvp"), "which SDE (Sec. 3.4)"),
    beta_min=(0.1, "beta(0) of VP and sub-VP"), beta_max=(20.0, "their beta(1)"),  # App. C
    sigma_min=(0.01, "sigma(0) of VE, in units of [0, 1]"),
    sigma_max=(50.0, "sigma(1) of VE, 0: measured (App. C)"),
    predictor=((*PREDICTORS, "ode"), "of each step (Table 1); ode: the probability flow ODE"),
    corrector=(("langevin", "ald", "none"), "after each step; ald: annealed Langevin dynamics"),
    num_steps=(1000, "N, predictor steps"), corrector_steps=(1, "M, corrector steps"),  # Table 1
    snr=(0.01, "r, the corrector's signal-to-noise ratio (Table 5)"),
    control_snr=(0.16, "r of tasks inpaint, colorize and class (Table 5, VE)"),
    tolerance=(1e-5, "absolute and relative, of the ODE (App. D.2)"),
    guidance=(1.0, "of task class; 1: Bayes' rule (Eq. 49)"),
    classifier=("", "checkpoint of the classifier; default: OUT/classifier.pt, trained there"),
    classifier_steps=(100_000, "training steps of the classifier (ours)"),
    dequantize=(False, "train on (v + u) / 256, u uniform, as bits/dim are measured (ours)"),
    weights=("", "published weights: google/ddpm-ema-cifar10-32, or diffusers' file or folder"),
    num_test=(64, "test images whose bits/dim are measured"),
    network=(("auto", "unet", "ddpm++", "ncsn++"), "auto: DDPM's unet, but App. H's on cifar10"),
    deep=(False, "ddpm++ and ncsn++: 8 residual blocks per level (App. H)"),
)
MNIST = dict(
    sigma_max=0.0, image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), dequantize=True,
    attention_resolutions=(14,), steps=50_000, warmup=1000, flip=False, classifier_steps=5000,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "mnist": MNIST, "fashion_mnist": MNIST,
    "folder": dict(sigma_max=0.0, flip=False),
    "digits": dict(  # not in the paper: trains in minutes on a laptop
        sigma_max=0.0, num_steps=400, corrector_steps=2, snr=0.35, control_snr=0.25,
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(8,), dropout=0.0, dequantize=True, lr=8e-3, batch_size=64,
        steps=3200, warmup=500, lr_decay=1.2, flip=False, classifier_steps=2000, guidance=3.0,
        num_samples=60, num_test=16, save_every=500,
    ),
}
PROCESS = ("sde", "beta_min", "beta_max", "sigma_min", "sigma_max")
NETWORKS = {"unet": UNet, "ddpm++": ddpm_plus_plus, "ncsn++": ncsn_plus_plus}


def preset(args):
    changes, network = dict(PRESETS.get(args.dataset, PRESETS["folder"])), args.network
    if args.sde == "ve":  # App. H.1; Table 5
        changes |= dict(predictor="reverse_diffusion", snr=0.16, ema_decay=0.999)
    if network == "auto" and args.dataset == "cifar10":  # App. H; Tables 2, 3
        network = "ncsn++" if args.sde == "ve" else "ddpm++"
    if network in ("ddpm++", "ncsn++") and (args.deep or args.dataset == "cifar10"):
        changes |= dict(num_res_blocks=8 if args.deep else 4)
    return changes | dict(network="unet" if network == "auto" else network)


def to_float(run, images):
    low, high = run.process.data_range
    return low + (high - low) * images.float() / 255


def to_uint8(run, x):
    low, high = run.process.data_range
    return ((x - low) / (high - low) * 256).clamp(0, 255).to(torch.uint8)


def training_images(run, images):
    return dequantize(images, run.process) if run.dequantize else to_float(run, images)


def prior(run, n):
    return run.process.prior((n, run.image_channels, *run.image_size), run.device)


def draw(run, x_T, chain, record=None):
    """x_T -> uint8 images by the steps of chain, or by the ODE if its predictor is "ode"."""
    run.calls, tolerances = 0, (run.tolerance, run.tolerance)
    if chain["predictor"] != "ode":
        return to_uint8(run, pc_sample(run.score, run.process, x_T, **chain, record=record))
    run.bf16 = False
    if record is not None:  # recording is not part of the samples' cost
        ode_sample(run.score, run.process, x_T[:8], *tolerances, record)
        run.calls = 0
    x, _ = ode_sample(run.score, run.process, x_T, *tolerances)
    if run.of_ddpm:  # denoised like the last step of its own chain: at t = 1 / T noise is visible
        x = posterior_mean(run.score, run.process, x, x.new_full((len(x),), run.process.eps))
    return to_uint8(run, x)


def sample(run):
    """Samples; process.png: a test image at the recorded times, then eight samples."""
    ode, chain = run.predictor == "ode", run.chain
    images, record = save_images(lambda _, n, record: draw(run, prior(run, n), chain, record), run)
    save_grid(images, run.out / "samples.png", columns=10)
    if record:
        rows, N = [*torch.stack(record, dim=1)[:8]], 15 if ode else run.num_steps
        if run.test is not None:
            steps = torch.tensor([0, *record_steps(N)], device=run.device)
            t = run.process.eps + (1 - run.process.eps) * steps / N
            x_0 = to_float(run, run.test[:1]).expand(len(t), -1, -1, -1)
            rows.insert(0, perturb(x_0, t, run.process))
        save_grid(to_uint8(run, torch.cat(rows)), run.out / "process.png", columns=len(record))
    how = {"predictor": "ode", "tolerance": run.tolerance} if ode else chain
    return {"n": run.num_samples, "sde": run.sde, **how, "evaluations": run.calls}


def samplers(run):
    """Table 1 as pictures: the same x_T through every sampler."""
    x_T, rows, table = prior(run, 10), [], []
    pairs = [(p, c) for p in PREDICTORS for c in CORRECTORS if not p == c == "none"
             and (run.process.ancestral or p != "ancestral")]  # those that are defined
    for predictor, corrector in [*pairs, ("ode", "none")]:
        seed_all(run.seed, "noise")  # the same in each row
        start, chain = time.time(), run.chain | {"predictor": predictor, "corrector": corrector}
        if predictor == "none":  # Table 1, C2000, and Table 5
            chain |= {"corrector_steps": 2, "snr": 0.22 if run.sde == "ve" else 0.27}
        rows.append(draw(run, x_T, chain))
        table.append(chain | {"evaluations": run.calls, "seconds": round(time.time() - start, 1)})
        line = "{predictor}, {corrector}: {evaluations} evaluations"
        print(f"{line}, {{seconds}} s".format(**table[-1]))
    labels = [line.format(**row) for row in table]
    save_grid(torch.cat(rows), run.out / "samplers.png", columns=10, labels=labels)
    return {"n": len(x_T), "sde": run.sde, **run.chain, "tolerance": run.tolerance, "table": table}


def bpd(run):
    run.bf16, run.calls, tolerances = False, 0, (run.tolerance, run.tolerance)
    parts = run.test[: run.num_test].split(run.sample_batch_size)
    bits = torch.cat([bits_per_dim(run.score, run.process, images, *tolerances, t_min=run.t_min)
                      for images in parts]).cpu()
    mean, error = bits.mean().item(), bits.std().item() / math.sqrt(len(bits))
    print(f"test bits/dim {mean:.4f} +- {error:.4f}: density of the ODE at t = {run.t_min:g}, "
          f"images uniformly dequantised; n = {len(bits)}")
    return {"n": len(bits), "split": "test", "bits_per_dim": mean, "standard_error": error,
            "is": "density of the ODE at t_min, not a bound; images uniformly dequantised; one "
            "Rademacher probe each", "t_min": run.t_min, "evaluations": run.calls, "sde": run.sde,
            "tolerance": run.tolerance}


def save_rows(run, columns, name):
    """A picture whose columns are these images, (n, C, H, W) each."""
    rows = torch.stack(columns, dim=1)
    save_grid(to_uint8(run, rows.flatten(0, 1)), run.out / name, columns=len(columns))


def interpolate(run):
    """Pairs of test images, and mixtures of their ODE codes (Fig. 6)."""
    run.bf16, tolerances = False, (run.tolerance, run.tolerance)
    x_0 = to_float(run, run.test[: min(16, len(run.test)) // 2 * 2])
    z, z_prime = ode_encode(run.score, run.process, x_0, *tolerances)[0].chunk(2)
    mixed = torch.cat([slerp_orthogonal(z, z_prime, k / 10) for k in range(11)])
    parts = mixed.split(run.sample_batch_size)  # of (11 * 8, C, H, W)
    x = [ode_sample(run.score, run.process, part, *tolerances)[0] for part in parts]
    x, (left, right) = torch.cat(x).chunk(11), x_0.chunk(2)
    save_rows(run, [left, *x, right], "interpolation.png")
    error = (torch.cat([x[0], x[-1]]) - x_0).abs().max().item()
    print(f"decoded codes differ from their images by at most {error:.1e}")
    return {"n": len(z), "split": "test", "largest_error": error, "evaluations": run.calls,
            "sde": run.sde, "tolerance": run.tolerance}


def inpainting(run):
    """Fig. 5: test images without their left half, right half or centre, six completions each."""
    x, (H, W), parts = to_float(run, run.test[:4]), run.image_size, []
    grey, masks = sum(run.process.data_range) / 2, x.new_ones(3, 1, 1, H, W)
    masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0
    masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0
    six = x.repeat(6, 1, 1, 1)
    for mask in masks:
        filled = inpaint(run.score, run.process, six, mask, prior(run, len(six)), **run.chain)
        parts.append([x * mask + grey * (1 - mask), *filled.chunk(6), x])
    save_rows(run, [torch.cat(column) for column in zip(*parts, strict=True)], "inpainting.png")
    return {"n": len(x), "split": "test", "completions": 6, **run.chain, "evaluations": run.calls}


def colorization(run):
    """Fig. 5: grey test images, six colourings each."""
    x = to_float(run, run.test[:8])
    gray = x.mean(1, keepdim=True)
    six = gray.repeat(6, 1, 1, 1)
    colored = colorize(run.score, run.process, six, prior(run, len(six)), **run.chain)
    save_rows(run, [gray.expand_as(x), *colored.chunk(6), x], "colorization.png")
    return {"n": len(x), "split": "test", "completions": 6, **run.chain, "evaluations": run.calls}


class Classifier(UNet):
    """The U-Net's way down and middle. forward(x (B, C, H, W), t (B,)) -> logits (B, classes)."""

    def __init__(self, in_channels, classes, **options):
        super().__init__(in_channels, classes, **options)
        width = self.mid[0].norm1.num_channels
        self.up, self.norm_out = nn.ModuleList(), group_norm(width)
        self.conv_out = nn.Linear(width, classes)

    def forward(self, x, t):
        temb = self.time_mlp(time_embedding(t, self.channels).to(x.dtype))
        h = self.conv_in(x)
        for module in (*self.down, *self.mid):
            h = module(h, temb)
        return self.conv_out(nn.functional.silu(self.norm_out(h)).mean((2, 3)))


def train_classifier(run):
    """The classifier of --classifier, or the one of OUT/classifier.pt, which is trained first."""
    if run.unlabelled or len(run.classes) < 2:
        raise ValueError(f"{[*run.unlabelled, run.dataset][0]} has no class: classes are folders, "
                         "at least two of them")
    path = Path(run.classifier or run.out / "classifier.pt")
    job = SimpleNamespace(**vars(run) | dict(
        steps=run.classifier_steps, file=path.name, checkpoint=run.classifier, loaded=None,
        resume=path.exists()))
    if path.exists() or run.classifier:
        job.loaded = load_checkpoint(path, (SCRIPT,))
        for key in (*PROCESS, *NETWORK, "classes"):
            if job.loaded["settings"][key] != getattr(run, key):
                raise ValueError(f"{path} was trained with another {key}")
    net = Classifier(run.image_channels, len(run.classes), **run.unet)
    classify = classifier_model(prepare(job, net), run.process)
    if not run.classifier:
        save_results(run, arguments=run.arguments)  # the same command will continue
        fit(net, lambda images, labels: classifier_loss(
            classify, training_images(run, images), labels, run.process), run.data, job)
    return classify


def class_conditional(run):
    """Samples of every class, and the classifier's accuracy at each t (Fig. 13)."""
    classify, K, table = train_classifier(run), len(run.classes), []
    x_0, labels = to_float(run, run.test[:1000]), run.test_labels[:1000]
    for t in (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7):
        x_t = perturb(x_0, x_0.new_full((len(x_0),), t), run.process)
        logits = [classify(x, x.new_full((len(x),), t)) for x in x_t.split(run.sample_batch_size)]
        table.append((t, (torch.cat(logits).argmax(1) == labels).float().mean().item()))
        print("t = {:g}: accuracy {:.3f}".format(*table[-1]))
    run.num_samples = K * math.ceil(run.num_samples / K)  # equally many of each

    def draw_classes(first, n, record):  # image i is of class i mod K
        run.calls, wanted = 0, (first + torch.arange(n, device=run.device)) % K
        guided = guided_score(run.score, class_log_prob(classify, wanted), run.guidance)
        return to_uint8(run, pc_sample(guided, run.process, prior(run, n), **run.chain))

    first, _ = save_images(draw_classes, run)
    columns = max(1, len(first) // K)
    rows = [first[k::K][:columns] for k in range(min(K, len(first)))]
    save_grid(torch.cat(rows), run.out / "classes.png", columns, run.classes[: len(rows)])
    return {"n": run.num_samples, "class": f"image i is of class i mod {K}", "t_accuracy": table,
            "guidance": run.guidance, **run.chain, "evaluations": run.calls}


TASKS = {"sample": sample, "samplers": samplers, "bpd": bpd, "interpolate": interpolate,
         "inpaint": inpainting, "colorize": colorization, "class": class_conditional}


def check(run):
    """Set run.of_ddpm, a ddpm.py checkpoint's settings, and run.chain, pc_sample's options.
    ValueError for what does not go together."""
    run.of_ddpm = run.loaded and run.loaded["method"] == "ddpm" and run.loaded["settings"]
    if run.network == "auto":
        run.network = preset(run)["network"]
    run.network = "unet" if run.of_ddpm else run.network
    controls = run.task in ("inpaint", "colorize", "class")
    if run.task == "class" and not run.checkpoint:
        raise ValueError("--task class takes the --checkpoint of a score network")
    if run.predictor == "ode" and controls:
        raise ValueError(f"--task {run.task} needs a --predictor other than ode")
    if run.of_ddpm and any(getattr(run, key) != SETTINGS[key][0] for key in PROCESS[1:4]):
        raise ValueError("--beta-min, --beta-max: the checkpoint has its own")
    run.chain = dict(N=run.num_steps, predictor=run.predictor, corrector=run.corrector,
                     snr=run.control_snr if controls else run.snr,
                     corrector_steps=run.corrector_steps)


def make_process(run):
    """The SDE of the arguments, or of a network of ddpm.py. VE's sigma(1) may be measured."""
    if run.of_ddpm:
        return ddpm_process(*(run.of_ddpm[key] for key in ("T", "beta_1", "beta_T")))
    if run.sde != "ve":
        return {"vp": VP, "subvp": SubVP}[run.sde](run.beta_min, run.beta_max)
    if not run.sigma_max:  # NCSNv2 takes 10,000 of more than 60,000 images
        images = run.data[0]
        few = torch.randperm(len(images))[: 10_000 if len(images) > 60_000 else None]
        run.sigma_max = max_pairwise_distance(images[few.to(images.device)]) / 255
    return VE(run.sigma_min, run.sigma_max)


def main(argv=None):
    with one_line_errors():
        run = read_args(argv, SETTINGS, preset, TASKS, (*PROCESS, "network"), reads=("ddpm",))
        check(run)
        run.needs_data = run.needs_data or run.task == "class" and not run.classifier
        setup(run)
        run.data = load_data(run)
        if run.task == "colorize" and run.image_channels != 3:
            raise ValueError("--task colorize takes colour images")
        run.process = make_process(run)
        run.t_min = run.process.eps if run.of_ddpm else 1e-5  # the likelihood's first time (App. C)
        if run.task == "samplers":  # the strictest of them
            check_sampler(run.process, run.num_steps, "reverse_diffusion", "langevin")
        elif run.task not in ("bpd", "interpolate") and run.predictor != "ode":
            check_sampler(run.process, run.num_steps, run.predictor, run.corrector)
        net = NETWORKS[run.network](run.image_channels, run.image_channels, **run.unet)
        score = score_model(prepare(run, net), run.process, run.of_ddpm and run.of_ddpm["T"],
                            log_sigma=run.network == "ncsn++")
        run.calls = 0

        def counted(x, t):
            run.calls += 1
            return score(x, t)

        run.score = counted
        if not run.checkpoint:
            fit(run.net, lambda x: dsm_loss(score, training_images(run, x), run.process),
                run.data[:1], run)
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
