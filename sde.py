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

from unet import UNet, ddpm_plus_plus, group_norm, ncsn_plus_plus, published, time_embedding

# ---- The method ----------------------------------------------------------------------------------


class SDE:
    """dx = f dt + g dw, Eq. (5), from data at t = 0 to the prior at t = 1, N(0, prior_std^2 I)."""

    T = None  # of ddpm_process: its number of steps

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
    sde = VP(T * beta_1, T * beta_T, eps=1 / T)
    sde.T = T
    return sde


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
              snr=0.16, corrector_steps=1, denoise=True, constrain=None, callback=None):
    """Alg. 1: x_T ~ sde.prior -> x_0, like x_T.
    N (1 + corrector_steps) evaluations of the score, fewer with a "none", and one to denoise.
    constrain(x, t) replaces x, at the start and after every step. callback(i, x) is called with
    every state, i the steps that are left: N ... 0, which is x_0. ValueError: see check_sampler."""
    check_sampler(sde, N, predictor, corrector)
    dt = (1 - sde.eps) / N
    times = torch.linspace(sde.eps, 1, N + 1, dtype=precision(x_T.device), device=x_T.device)
    times = times[:, None].expand(-1, len(x_T))  # (N + 1, B), index = the step i
    constrain = (lambda x, t: x) if constrain is None else constrain
    callback = (lambda i, x: None) if callback is None else callback
    x = constrain(x_T, times[N])
    for i in range(N, 0, -1):  # Alg. 1, line 2; i is the paper's i + 1
        callback(i, x)
        t, t_next = times[i], times[i - 1]
        if predictor != "none":
            x = constrain(predict(score, sde, x, t, dt, predictor), t_next)  # Alg. 1, line 3
        for _ in range(corrector_steps if corrector != "none" else 0):
            x = correct(score, sde, x, t_next, dt, corrector, snr)  # Alg. 1, line 5
            x = constrain(x, t_next)
    if denoise:
        x = posterior_mean(score, sde, x, times[0])
    callback(0, x)
    return x


def probability_flow(score, sde, dtype):
    """drift(x, t) of the ODE whose x(t) has the densities of the SDE; score takes this dtype."""

    def drift(x, t):
        f, g = sde.drift_diffusion(x, t)
        s = score(x.to(dtype), t.to(dtype)).to(x.dtype)
        return f - 0.5 * expand(g**2, x) * s  # Eq. (13)

    return drift


@torch.no_grad()
def ode_sample(score, sde, x_T, rtol=1e-5, atol=1e-5):
    """x_T ~ sde.prior -> x at sde.eps, like x_T, and the evaluations of the score."""
    drift, x = probability_flow(score, sde, x_T.dtype), x_T.to(precision(x_T.device))
    x_0, evaluations = dormand_prince(drift, x, 1.0, sde.eps, rtol, atol)
    return x_0.to(x_T.dtype), evaluations


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

METHOD = "sde"  # in checkpoints
# a checkpoint decides these
FIXED = ("sde", "beta_min", "beta_max", "sigma_min", "sigma_max", "network", "deep", "dequantize")
# other methods' checkpoints, and settings that these lack
READS = {"ddpm": dict(sde="vp", network="unet", deep=False, dequantize=False)}
SETTINGS = dict(  # CIFAR-10, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=950_000, flip=True,  # App. H
    image_size=[32, 32], channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2,  # DDPM's
    attention_resolutions=[16], dropout=0.1, warmup=5000, grad_clip=1.0,  # released code
    num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
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
    classifier=("", "classifier.pt of an earlier run; default: OUT/classifier.pt, trained there"),
    classifier_steps=(100_000, "training steps of the classifier (ours)"),
    dequantize=(False, "train on (v + u) / 256, u uniform, as bits/dim are measured (ours)"),
    weights=("", "published weights: google/ddpm-ema-cifar10-32, or diffusers' file or folder"),
    num_test=(64, "test images whose bits/dim are measured"),
    network=(("auto", "unet", "ddpm++", "ncsn++"), "auto: DDPM's unet, but App. H's on cifar10"),
    deep=(False, "ddpm++ and ncsn++: 8 residual blocks per level (App. H)"),
)
MNIST = dict(
    sigma_max=0.0, image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], dequantize=True,
    attention_resolutions=[14], steps=50_000, warmup=1000, flip=False, classifier_steps=5000,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "mnist": MNIST, "fashion_mnist": MNIST,
    "folder": dict(sigma_max=0.0, flip=False),
    "digits": dict(  # not in the paper: trains in minutes on a laptop
        sigma_max=0.0, num_steps=400, corrector_steps=2, snr=0.35, control_snr=0.25,
        image_size=[16, 16], channels=16, channel_mult=[1, 2, 4], num_res_blocks=1,
        attention_resolutions=[8], dropout=0.0, dequantize=True, lr=8e-3, batch_size=64,
        steps=3200, warmup=500, lr_decay=1.2, flip=False, classifier_steps=2000, guidance=3.0,
        num_samples=60, num_test=16, save_every=1000, preview=4,
    ),
}
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


def to_float(process, images):
    low, high = process.data_range
    return low + (high - low) * images.float() / 255


def to_uint8(args, process, x):
    """The inverse of training_images: (v + u) / 256 or v / 255, so scaled, is level v."""
    if not x.isfinite().all():
        raise ValueError("a sample is not finite")
    low, high = process.data_range
    x = (x - low) / (high - low)
    return (256 * x if args.dequantize else 255 * x + 0.5).clamp(0, 255).to(torch.uint8)


def technique1(images):
    """sigma_1 for uint8 images. The sequel takes 10,000 of more than 60,000."""
    few = torch.randperm(len(images))[: 10_000 if len(images) > 60_000 else None]
    return max_pairwise_distance(images[few.to(images.device)]) / 255


def training_images(args, process, images):
    return dequantize(images, process) if args.dequantize else to_float(process, images)


def score_of(args, net, process):
    return score_model(net, process, process.T, log_sigma=args.network == "ncsn++")


def loss(args, net, process, images):
    score = score_of(args, net, process)
    return dsm_loss(score, training_images(args, process, images), process)


def prior(args, device, process, n):
    return process.prior((n, args.image_channels, *args.image_size), device)


def chain(args):
    """pc_sample's options."""
    controls = args.task in ("inpaint", "colorize", "class")
    return dict(N=args.num_steps, predictor=args.predictor, corrector=args.corrector,
                snr=args.control_snr if controls else args.snr,
                corrector_steps=args.corrector_steps)


def draw(args, score, process, x_T, options, callback=None):
    """x_T -> x_0 by pc_sample with options, or by the ODE; and the evaluations of the score."""
    if options["predictor"] != "ode":
        x_0 = pc_sample(score, process, x_T, **options, callback=callback)
        corrections = options["corrector_steps"] * (options["corrector"] != "none")
        return x_0, options["N"] * ((options["predictor"] != "none") + corrections) + 1
    x, n = ode_sample(score, process, x_T, args.tolerance, args.tolerance)
    if not process.T:
        return x, n
    # denoised like the last step of its own chain: at t = 1 / T noise is visible
    return posterior_mean(score, process, x, x.new_full((len(x),), process.eps)), n + 1


def preview(args, device, net, process):
    score, x_T = score_of(args, net, process), prior(args, device, process, args.preview)
    return to_uint8(args, process, draw(args, score, process, x_T, chain(args))[0])


def sample(args, device, net, process):
    options, states, calls = chain(args), {}, 0
    net = net if args.predictor == "ode" else fast(net, args, device)
    score = score_of(args, net, process)
    for first, n in batches(args):
        x_T = prior(args, device, process, n)
        x_0, calls = draw(args, score, process, x_T, options, partial(keep, states))
        save_images(to_uint8(args, process, x_0), first, args)
    save_pictures(args, states, lambda x: to_uint8(args, process, x))
    return {"n": args.num_samples, "evaluations": calls}


def samplers(args, device, net, process):
    """Table 1 as pictures: the same x_T through every sampler."""
    x_T, rows, table = prior(args, device, process, 10), [], []
    exact, quick = (score_of(args, f, process) for f in (net, fast(net, args, device)))
    pairs = [(p, c) for p in PREDICTORS for c in CORRECTORS if not p == c == "none"
             and (process.ancestral or p != "ancestral")]  # those that are defined
    for predictor, corrector in [*pairs, ("ode", "none")]:
        seed_all(args.seed, "noise")  # the same in each row
        start, options = time.time(), chain(args) | {"predictor": predictor, "corrector": corrector}
        if predictor == "none":  # Table 1, C2000, and Table 5
            options |= {"corrector_steps": 2, "snr": 0.22 if args.sde == "ve" else 0.27}
        score = exact if predictor == "ode" else quick
        x_0, calls = draw(args, score, process, x_T, options)
        rows.append(to_uint8(args, process, x_0).cpu())
        table.append(options | {"evaluations": calls, "seconds": round(time.time() - start, 1)})
        line = "{predictor}, {corrector}: {evaluations} evaluations"
        print(f"{line}, {{seconds}} s".format(**table[-1]))
    labels = [line.format(**row) for row in table]
    save_grid(torch.cat(rows), Path(args.out, "samplers.png"), columns=10, labels=labels)
    return {"n": len(x_T), "table": table}


def bpd(args, device, net, process):
    score, tolerances = score_of(args, net, process), (args.tolerance, args.tolerance)
    t_min = process.eps if process.T else 1e-5  # App. C
    images, _ = load_images(args, device, args.num_test)
    bits = torch.cat([bits_per_dim(score, process, part, *tolerances, t_min=t_min)
                      for part in images.split(args.sample_batch_size)]).cpu()
    n, mean = len(bits), bits.mean().item()
    error = round(bits.std().item() / n**0.5, 4) if n > 1 else None
    print(f"test bits/dim {mean:.4f} +- {error}: density of the ODE at t = {t_min:g}, "
          f"images uniformly dequantised; n = {n}")
    return {"n": n, "split": "test", "bits_per_dim": mean, "standard_error": error, "t_min": t_min}


def save_rows(args, process, columns, name):
    """A picture whose columns are these images, (n, C, H, W) each."""
    images = to_uint8(args, process, torch.stack(columns, dim=1).flatten(0, 1))
    save_grid(images, Path(args.out, name), len(columns))


def interpolate(args, device, net, process):
    """Pairs of test images, and mixtures of their ODE codes (Fig. 6)."""
    score, tolerances = score_of(args, net, process), (args.tolerance, args.tolerance)
    x_0 = to_float(process, load_images(args, device, 16)[0])
    if len(x_0) < 2:
        raise ValueError("task interpolate needs two test images")
    x_0 = x_0[: len(x_0) // 2 * 2]
    z, z_prime = ode_encode(score, process, x_0, *tolerances)[0].chunk(2)
    mixed = torch.cat([slerp_orthogonal(z, z_prime, k / 10) for k in range(11)])
    parts = mixed.split(args.sample_batch_size)  # of (11 * 8, C, H, W)
    x = torch.cat([ode_sample(score, process, part, *tolerances)[0] for part in parts]).chunk(11)
    left, right = x_0.chunk(2)
    save_rows(args, process, [left, *x, right], "interpolation.png")
    error = (torch.cat([x[0], x[-1]]) - x_0).abs().max().item()
    print(f"decoded codes differ from their images by at most {error:.1e}")
    return {"n": len(z), "split": "test", "largest_error": error}


def inpainting(args, device, net, process):
    """Fig. 5: test images without their left half, right half or centre, six completions each."""
    score, (H, W), parts = score_of(args, fast(net, args, device), process), args.image_size, []
    x = to_float(process, load_images(args, device, 4)[0])
    grey, masks = sum(process.data_range) / 2, x.new_ones(3, 1, 1, H, W)
    masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0
    masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0
    six = x.repeat(6, 1, 1, 1)
    for mask in masks:
        x_T = prior(args, device, process, len(six))
        filled = inpaint(score, process, six, mask, x_T, **chain(args))
        parts.append([x * mask + grey * (1 - mask), *filled.chunk(6), x])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    save_rows(args, process, columns, "inpainting.png")
    return {"n": len(x), "split": "test", "completions": 6}


def colorization(args, device, net, process):
    """Fig. 5: grey test images, six colourings each."""
    score = score_of(args, fast(net, args, device), process)
    x = to_float(process, load_images(args, device, 8)[0])
    gray = x.mean(1, keepdim=True)
    six = gray.repeat(6, 1, 1, 1)
    x_T = prior(args, device, process, len(six))
    colored = colorize(score, process, six, x_T, **chain(args))
    columns = [gray.expand_as(x), *colored.chunk(6), x]
    save_rows(args, process, columns, "colorization.png")
    return {"n": len(x), "split": "test", "completions": 6}


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


def train_classifier(args, device, process):
    """A classifier(x, t) -> logits (B, K), K and its steps: a new one, saved as OUT/classifier.pt,
    or that of --classifier, with the rest of its training if this was interrupted."""
    method, loaded, steps = "sde's classifier", None, args.classifier_steps
    if args.classifier:
        loaded = load_checkpoint(args.classifier, [method])
        steps = loaded["settings"]["steps"]
        for key in ("image_channels", *UNET, *FIXED[:5]):  # 5 of them: the process
            if loaded["settings"][key] != getattr(args, key):
                raise ValueError(f"{args.classifier} was trained with another {key}")
    images, labels = load_images(args, device)
    if labels.min() < 0 or labels.max() < 1:
        raise ValueError(f"{args.dataset}: each image must be in the folder of its class")
    K = int(labels.max()) + 1
    options = {key: getattr(args, key) for key in UNET}
    net = Classifier(args.image_channels, K, **options).to(device)
    fit(net, lambda model, images, labels: classifier_loss(
        classifier_model(model, process), training_images(args, process, images), labels, process),
        [images, labels], argparse.Namespace(**vars(args) | {"steps": steps}), device, loaded,
        method=method, file="classifier.pt", again="take it as --classifier with another --out")
    return classifier_model(net.eval().requires_grad_(False), process), K, steps


def class_conditional(args, device, net, process):
    """Samples of every class, and the classifier's accuracy at each t (Fig. 13)."""
    classify, K, steps = train_classifier(args, device, process)
    images, labels = load_images(args, device, 1000)
    x_0, table = to_float(process, images), []
    for t in (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7):
        x_t = perturb(x_0, x_0.new_full((len(x_0),), t), process)
        logits = [classify(x, x.new_full((len(x),), t)) for x in x_t.split(args.sample_batch_size)]
        table.append((t, (torch.cat(logits).argmax(1) == labels).float().mean().item()))
        print("t = {:g}: accuracy {:.3f}".format(*table[-1]))
    score = score_of(args, fast(net, args, device), process)
    for first, n in batches(args):
        log_prob = class_log_prob(classify, (first + torch.arange(n, device=device)) % K)
        x = pc_sample(guided_score(score, log_prob, args.guidance), process,
                      prior(args, device, process, n), **chain(args))
        save_images(to_uint8(args, process, x), first, args)
    save_pictures(args, {}, to_uint8, columns=K)
    return {"n": args.num_samples, "class": f"image i is of class i mod {K}", "t_accuracy": table,
            "classifier_steps": steps}


TASKS = {"sample": sample, "samplers": samplers, "bpd": bpd, "interpolate": interpolate,
         "inpaint": inpainting, "colorize": colorization, "class": class_conditional}


def make_process(args, loaded):
    """The SDE of the arguments, or of a network of ddpm.py."""
    if loaded and loaded["method"] == "ddpm":
        return ddpm_process(*(loaded["settings"][key] for key in ("T", "beta_1", "beta_T")))
    if args.sde == "ve":
        return VE(args.sigma_min, args.sigma_max)
    return {"vp": VP, "subvp": SubVP}[args.sde](args.beta_min, args.beta_max)


def check(args, trains, process):
    """ValueError for what does not go together."""
    if args.task == "class" and trains:
        raise ValueError("--task class takes the --checkpoint of a score network")
    if args.task == "colorize" and args.image_channels != 3:
        raise ValueError("--task colorize takes colour images")
    if args.predictor == "ode" and args.task in ("inpaint", "colorize", "class"):
        raise ValueError(f"--task {args.task} needs a --predictor other than ode")
    if args.deep and args.network == "unet":
        raise ValueError("--deep is for --network ddpm++ or ncsn++")
    if process.T and (args.beta_min, args.beta_max) != (0.1, 20.0):
        raise ValueError("--beta-min, --beta-max: the checkpoint has its own")
    if args.task == "samplers":  # the strictest of them
        check_sampler(process, args.num_steps, "reverse_diffusion", "langevin")
    elif args.predictor != "ode" and (
            args.task not in ("bpd", "interpolate") or trains and args.preview):
        check_sampler(process, args.num_steps, args.predictor, args.corrector)


def main(argv=None):
    args, loaded, trains = read_args(argv)
    device = setup(args)
    if trains:
        images, _ = load_images(args, device)
        args.image_channels = images.shape[1]
        if args.sde == "ve":
            args.sigma_max = args.sigma_max or technique1(images)
    process = make_process(args, loaded)
    check(args, trains, process)
    C, options = args.image_channels, {key: getattr(args, key) for key in UNET}
    net = NETWORKS[args.network](C, C, **options).to(device)
    if trains:
        fit(net, lambda model, x: loss(args, model, process, x), [images], args, device, loaded,
            lambda ema: preview(args, device, ema, process))
    else:
        net.load_state_dict(loaded["ema"])
    net.eval().requires_grad_(False)
    do_tasks(args, loaded, trains, TASKS, ("bpd",), device, net, process)


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
