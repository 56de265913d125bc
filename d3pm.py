"""Diffusion on categories: Multinomial Diffusion (Hoogeboom et al. 2021, arXiv:2102.05379) and D3PM
(Austin, Johnson, Ho, Tarlow, van den Berg 2021, arXiv:2107.03006). Bare numbers are D3PM's.

Implements: Eq. (1), (2), (3), (4), (5), (18); Table 1; of Multinomial Diffusion Eq. (13), (14).

    t               time, 1 (almost data) ... T (noise)         (B,) int64; the network gets t - 1
    x_0, x_t        data, and data after t steps of noise       (B, ...) int64 in 0..K-1
    Q, Q_bar        one step's matrix; product of steps 1..t    (K, K), [i, j]: from i to j
    beta            jump probability; Gaussian: 2 x variance    (T + 1,), index = t, beta[0] = 0
    alpha_bar       product of 1 - beta_1 ... 1 - beta_t        (T + 1,), alpha_bar[0] = 1
    model(x_t, t)   the network: logits of p~(x_0 | x_t)        (B, ..., K)

    python d3pm.py                                              train on digits, sample, bits/dim
    python d3pm.py --dataset cifar10                            the paper's best run
    python d3pm.py --dataset text8                              text; or any file: --dataset FILE
    python d3pm.py --method multinomial                         the first paper's method
    python d3pm.py --checkpoint runs/d3pm-digits/checkpoint.pt --task infill

theta_post of the first paper is Eq. (4) with the uniform transition. Deviations from the papers:
1. The hybrid loss as released: one random term of L_vb, without the factor T, + hybrid * CE; a mean
   over positions, in nats (released: bits for images, a sum for text, which matters to clipping).
2. The Gaussian's beta is multiplied by 1000 / T where T < 1000, so that the noise still mixes.
3. x_t is drawn from q itself; the released code adds 1e-6 to every probability. The EMA decay
   after n steps is min(decay, (1 + n) / (10 + n)).
4. Text: one Transformer of torch's layers for both papers, with a convolution before it.
5. --method multinomial: t is uniform, as in D3PM, and the learning rate constant.
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
import unicodedata
import urllib.request
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from unet import UNet, published, time_embedding

# ---- The method ----------------------------------------------------------------------------------


def uniform_matrix(K, beta):
    """(K, K) float64, App. A.2.1: with probability beta the state is drawn anew, uniformly."""
    return (1 - beta) * torch.eye(K, dtype=torch.float64) + beta / K  # D3PM Eq. (2)


def absorbing_matrix(K, beta, mask):
    """(K, K) float64, App. A.2.2: with probability beta the state becomes mask, for good."""
    Q = (1 - beta) * torch.eye(K, dtype=torch.float64)
    Q[:, mask] += beta  # D3PM Eq. (2)
    return Q


def gaussian_matrix(K, beta):
    """(K, K) float64, App. A.2.3: jumps from a discretised Gaussian, whose variance is beta / 2 on
    states scaled to [-1, 1]. A jump that would leave 0..K-1 is not made, so that Q is symmetric."""
    jump = torch.arange(1 - K, K, dtype=torch.float64)
    weight = (-4 * jump.square() / ((K - 1) ** 2 * beta)).softmax(0)  # (2 K - 1,)
    state = torch.arange(K)
    Q = weight[state - state[:, None] + K - 1].fill_diagonal_(0)
    return Q + (1 - Q.sum(1)).diag()  # D3PM Eq. (2)


def published_beta(transition, T):
    """(T + 1,) float64: the schedule that the papers take for a transition, index = t."""
    t = torch.arange(T + 1, dtype=torch.float64)
    if transition == "uniform":
        alpha_bar = ((t / T + 0.008) / 1.008 * math.pi / 2).cos()  # D3PM Eq. (18), a misprint fixed
        later = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)  # the cap: released code
    elif transition == "absorbing":
        later = 1 / (T - t[1:] + 1)  # Sec. 3.2: x_0 has lost t / T of its states after t steps
    else:
        later = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * max(1, 1000 / T)
    return torch.cat([torch.zeros(1, dtype=torch.float64), later])


def precision(device):
    """The dtype of tables: float64, which only mps lacks."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def rows(Q, x):
    """Row x of each matrix, (B, ..., K): one-hot x times Q, exactly; Q (B, K, K), x (B, ...)."""
    return Q[expand(torch.arange(len(Q), device=x.device), x), x]


def categorical(probs):
    """One state (...) int64 from each row of probs (..., K) >= 0, which need not sum to 1."""
    # of K exponential waiting times with these rates the first is state k with probability
    # probs[k]; unlike torch.multinomial this does not wait for a GPU
    return (probs / torch.empty_like(probs).exponential_().clamp(min=1e-30)).argmax(-1)


class CategoricalDiffusion:
    """The forward process q on K states: independent for every position of x (B, ...).

    transition "uniform" or "absorbing": a state stays with probability 1 - beta, else it is drawn
    from `prior`, so that everything is a closed form in beta and alpha_bar. "gaussian": the T
    matrices and their products are tables (T + 1, K, K). Tables are float64. beta (T + 1,): None
    for the published one; mask: the absorbing state, None for K // 2. ValueError: anything
    undefined, or the published Gaussian where K < 16 states are too far apart for it to mix."""

    def __init__(self, K, T, transition="uniform", beta=None, mask=None):
        if transition not in ("uniform", "absorbing", "gaussian"):
            raise ValueError(f"transition {transition!r} is not uniform, absorbing or gaussian")
        if K < 2 or T < 1:
            raise ValueError(f"K = {K} states, T = {T} steps: need K >= 2, T >= 1")
        if mask is not None and (transition != "absorbing" or not 0 <= mask < K):
            raise ValueError(f"mask {mask}: only an absorbing transition has one, in 0..{K - 1}")
        if beta is None and transition == "gaussian" and K < 16:
            raise ValueError(f"the Gaussian's published beta needs K >= 16 states, not {K}")
        beta = published_beta(transition, T) if beta is None else beta.double()
        most = math.inf if transition == "gaussian" else 1
        inside = (beta[1:] > 0) & (beta[1:] <= most)
        if beta.shape != (T + 1,) or beta[0] != 0 or not inside.all():
            raise ValueError(f"beta is not 0 and then {T} numbers in (0, {most}]")
        self.K, self.T, self.transition, self.beta, self.mask = K, T, transition, beta, mask
        self.prior = torch.full((K,), 1 / K, dtype=torch.float64)
        self.alpha_bar = (1 - beta).cumprod(0)  # not for "gaussian"
        if transition == "absorbing":
            self.mask = K // 2 if mask is None else mask
            self.prior = F.one_hot(torch.tensor(self.mask), K).double()
        if transition == "gaussian":
            self.matrices = torch.eye(K, dtype=torch.float64).repeat(T + 1, 1, 1)
            self.products = self.matrices.clone()
            for t in range(1, T + 1):
                self.matrices[t] = gaussian_matrix(K, beta[t])
                self.products[t] = self.products[t - 1] @ self.matrices[t]  # of D3PM Eq. (3)

    def to(self, device):
        """Move the tables, in place like a module."""
        for name in {"beta", "prior", "alpha_bar", "matrices", "products"} & vars(self).keys():
            setattr(self, name, getattr(self, name).to(device, precision(device)))
        return self

    def closed_form(self, jump):
        """(K, K): each state stays with probability 1 - jump, else it is drawn from the prior."""
        if self.transition == "uniform":
            return uniform_matrix(self.K, jump.item())
        return absorbing_matrix(self.K, jump.item(), self.mask)

    def Q(self, t):
        """(K, K), t an int in 0..T; for inspection: only the Gaussian computes with matrices."""
        gaussian = self.transition == "gaussian"
        return self.matrices[t] if gaussian else self.closed_form(self.beta[t])

    def Q_bar(self, t):
        """(K, K): Q_1 Q_2 ... Q_t, t an int in 0..T."""
        gaussian = self.transition == "gaussian"
        return self.products[t] if gaussian else self.closed_form(1 - self.alpha_bar[t])

    def marginal(self, x_0_probs, t):
        """x_0_probs Q_bar_t, like x_0_probs (B, ..., K); t (B,) in 0..T."""
        if self.transition == "gaussian":
            Q_bar = self.products[t].to(x_0_probs.dtype)  # (B, K, K)
            flat = x_0_probs.reshape(len(Q_bar), -1, self.K)
            return (flat @ Q_bar).view_as(x_0_probs)  # D3PM Eq. (3)
        stay, jump = (expand(p, x_0_probs) for p in (self.alpha_bar[t], 1 - self.alpha_bar[t]))
        return stay * x_0_probs + jump * self.prior.to(x_0_probs.dtype)  # D3PM Eq. (3)

    def likelihood(self, x_t, t, dtype):
        """x_t Q_t^T (B, ..., K): q(x_t | x_{t-1}) of every x_{t-1}; t (B,) in 1..T."""
        if self.transition == "gaussian":
            return rows(self.matrices[t].to(dtype), x_t)  # Q is symmetric
        here = F.one_hot(x_t, self.K).to(dtype)
        stay, jump = (expand(p, here) for p in (1 - self.beta[t], self.beta[t]))
        return stay * here + jump * self.prior.to(dtype)[x_t].unsqueeze(-1)

    def q_probs(self, x_0, t, dtype=None):
        """q(x_t | x_0) (B, ..., K), Eq. (3), in the tables' precision or in dtype; t in 0..T."""
        dtype = dtype or self.beta.dtype
        if self.transition == "gaussian":
            return rows(self.products[t].to(dtype), x_0)  # D3PM Eq. (3)
        return self.marginal(F.one_hot(x_0, self.K).to(dtype), t)

    def q_sample(self, x_0, t):
        """x_t ~ q(x_t | x_0), like x_0 (B, ...) int64; t (B,) in 0..T."""
        if self.transition == "gaussian":
            return categorical(self.q_probs(x_0, t, torch.float32))
        u = torch.rand(x_0.shape, device=x_0.device)
        return torch.where(u < expand(self.alpha_bar[t], u), x_0, self.prior_sample(x_0.shape))

    def prior_sample(self, shape):
        """x_T ~ p(x_T), int64 of this shape: (nearly) the same as q(x_T | x_0) for every x_0."""
        if self.transition == "absorbing":
            return torch.full(shape, self.mask, device=self.beta.device)
        return torch.randint(self.K, shape, device=self.beta.device)

    def posterior(self, x_0_probs, x_t, t):
        """Probabilities of x_{t-1}, like x_0_probs (B, ..., K); x_t (B, ...), t (B,) in 1..T.
        A one-hot x_0 gives q(x_{t-1} | x_t, x_0), Eq. (3); a prediction p~(x_0 | x_t) gives
        p(x_{t-1} | x_t), Eq. (4): x_t Q_t^T has no x_0 in it, so that the sum over x_0 of joint
        probabilities is the same formula. Where x_t cannot come from x_0 it is uniform."""
        return self.bayes(self.marginal(x_0_probs, t - 1), x_t, t)  # D3PM Eq. (4)

    def bayes(self, probs, x_t, t):
        """Probabilities of x_{t-1} given x_t from those before x_t was seen, both (B, ..., K)."""
        product = self.likelihood(x_t, t, probs.dtype) * probs + 1e-30  # finite when normalised
        # D3PM Eq. (3): x_t Q_t^T * x_0 Q_bar_{t-1} / (x_0 Q_bar_t x_t^T); Eq. (4) is its numerator
        # with p~ for x_0; with the uniform transition they are Multinomial Eq. (13)
        return product / product.sum(-1, keepdim=True)


def bound_terms(log_p_0, x_0, x_t, t, diffusion):
    """L_vb's term at t and the cross entropy -log p~(x_0 | x_t), in nats, like x_0 (B, ...);
    log_p_0 (B, ..., K): log p~(. | x_t). The term is L_{t-1}, a KL divergence; at t = 1 it is L_0,
    where both papers let p(x_0 | x_1) be the prediction itself."""
    cross_entropy = -log_p_0.gather(-1, x_0[..., None]).squeeze(-1)  # Multinomial Eq. (14)
    q = diffusion.bayes(diffusion.q_probs(x_0, t - 1, log_p_0.dtype), x_t, t)  # D3PM Eq. (3)
    p = diffusion.posterior(log_p_0.exp(), x_t, t)  # D3PM Eq. (4)
    divergence = (q * (q.log() - p.log())).sum(-1)
    term = torch.where(expand(t, x_0) == 1, cross_entropy, divergence)  # D3PM Eq. (1)
    return term, cross_entropy


def d3pm_loss(model, x_0, diffusion, hybrid=0.001):
    """L_lambda with lambda = hybrid, in nats, mean over the batch and all positions of x_0: one
    term of L_vb, at a random t, and hybrid times the cross entropy. T times the first, plus L_T,
    which has no parameters, is the bound, Multinomial Diffusion's loss (hybrid = 0)."""
    t = torch.randint(1, diffusion.T + 1, (len(x_0),), device=x_0.device)
    x_t = diffusion.q_sample(x_0, t)
    log_p_0 = model(x_t, t).log_softmax(-1)
    term, cross_entropy = bound_terms(log_p_0, x_0, x_t, t, diffusion)
    return term.mean() + hybrid * cross_entropy.mean()  # D3PM Eq. (5)


def record_steps(T):
    """At most 15 evenly spaced steps of 1..T, ascending: a sampler records its states there."""
    return sorted({math.ceil(T * k / 15) for k in range(1, 16)})


@torch.no_grad()
def d3pm_sample(model, x_T, diffusion, final_mode=False, t_start=None, record=None):
    """x_T ~ p(x_T) -> x_0, like x_T (B, ...), in T evaluations of the model. final_mode: x_0 is the
    mode of p(x_0 | x_1), as released, and not drawn. t_start: begin at this step, with x_T as its
    x_t. record: a list that gets x_t at the steps of record_steps, and x_0."""
    x_t, t_start = x_T, t_start or diffusion.T
    recorded = () if record is None else record_steps(t_start)
    for step in range(t_start, 0, -1):
        if step in recorded:
            record.append(x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        probs = model(x_t, t).softmax(-1)  # p~(x_0 | x_t), at t = 1 this is p(x_0 | x_1)
        if step > 1:
            probs = diffusion.posterior(probs, x_t, t)  # D3PM Eq. (4)
        x_t = probs.argmax(-1) if final_mode and step == 1 else categorical(probs)
    if record is not None:
        record.append(x_t)
    return x_t


def skip_steps(model, diffusion, tau):
    """The model and its process in fewer steps, from tau[i] to tau[i - 1] each, as in Table 1; tau:
    ascending ints in 1..T, the last T. Eq. (4) holds for such a step with Q_{s+1} ... Q_t for Q_t:
    a closed form in 1 - beta = alpha_bar_t / alpha_bar_s. ValueError for the Gaussian."""
    if diffusion.transition == "gaussian":
        raise ValueError("the Gaussian transition has no closed form to skip steps with")
    if not tau or tau != sorted(set(tau)) or tau[0] < 1 or tau[-1] != diffusion.T:
        raise ValueError(f"steps {tau} do not ascend from 1 or more to {diffusion.T}")
    steps = torch.tensor([0, *tau], device=diffusion.beta.device)
    short = CategoricalDiffusion(diffusion.K, len(tau), diffusion.transition, mask=diffusion.mask)
    short.to(steps.device).alpha_bar = diffusion.alpha_bar[steps]
    stay = [(1 - diffusion.beta[s + 1 : t + 1]).prod() for s, t in pairwise([0, *tau])]
    short.beta = F.pad(1 - torch.stack(stay), (1, 0))  # alpha_bar_t / alpha_bar_s may be 0 / 0
    return lambda x_t, t: model(x_t, steps[t]), short


@torch.no_grad()
def bits_per_dim(model, x_0, diffusion):
    """The variational bound on -log2 p(x_0), in bits per position of x_0 (B, ...), one x_t each:
    "total" (B,), "L_T" (B,), "L_t" (B, T - 1): the terms of t = 2..T in this order, "L_0" (B,)."""
    precise, terms = diffusion.beta.dtype, []
    for step in range(1, diffusion.T + 1):
        t = torch.full((len(x_0),), step, device=x_0.device)
        x_t = diffusion.q_sample(x_0, t)
        log_p_0 = model(x_t, t).to(precise).log_softmax(-1)
        term, _ = bound_terms(log_p_0, x_0, x_t, t, diffusion)
        terms.append(term.flatten(1).mean(1) / math.log(2))
    L_0, L_t = terms[0], torch.stack(terms, dim=1)[:, 1:]
    q = diffusion.q_probs(x_0, t)  # of x_T
    divergence = (torch.xlogy(q, q) - torch.xlogy(q, diffusion.prior)).sum(-1)
    L_T = divergence.flatten(1).mean(1) / math.log(2)
    return {"total": L_T + L_t.sum(1) + L_0, "L_T": L_T, "L_t": L_t, "L_0": L_0}  # D3PM Eq. (1)


def infill(model, x, known, diffusion, record=None):
    """x_0 like x (B, ...) whose positions are x's where known is True; known broadcasts against x.
    The others begin as masks, at the t that masks that many on average. Known positions are
    predicted with certainty and stay: in Eq. (4) only a mask changes. ValueError: not absorbing."""
    if diffusion.transition != "absorbing":
        raise ValueError("only the absorbing transition marks the positions to fill in")
    certain = F.one_hot(x, diffusion.K).log()  # 0 at x, -inf elsewhere

    def informed(x_t, t):
        return torch.where(known[..., None], certain, model(x_t, t))

    masked = 1 - known.to(diffusion.beta.dtype).mean()
    t_start = max(1, int((1 - diffusion.alpha_bar[1:] <= masked + 1e-9).sum()))  # rounding aside
    x_t = torch.where(known, x, diffusion.mask)
    return d3pm_sample(informed, x_t, diffusion, t_start=t_start, record=record)


def residual_logits(output, x_t):
    """Logits (..., K) of x_0 from the network's (..., K): the state of x_t is ahead by 1."""
    return output + F.one_hot(x_t, output.shape[-1])  # released code, not in the paper


def discretized_logistic_logits(mean, log_scale, K):
    """Logits (..., K) of a logistic distribution cut to K equal bins around -1 ... 1, App. A.8, of
    this mean (...) and scale exp(log_scale - 2), as released."""
    half = 1 / (K - 1)  # half a bin's width
    centre = torch.linspace(-1, 1, K, dtype=mean.dtype, device=mean.device) - mean[..., None]
    sharpness = (2 - log_scale[..., None]).exp()
    upper, lower = (centre + half) * sharpness, (centre - half) * sharpness
    # log(sigmoid(u) - sigmoid(l)) = log sigmoid(u) + log sigmoid(-l) + log(1 - exp(l - u)): the
    # last term is the same for all bins, so that the softmax removes it
    return F.logsigmoid(upper) + F.logsigmoid(-lower)


def image_model(net, K, head):
    """model(x_t, t) -> logits (B, C, H, W, K), from a network that takes x_t in [-1, 1] and t - 1.
    head "logistic": its 2 C channels are a mean, relative to x_t, and a log scale; "residual": its
    C K channels are added to x_t's one-hot."""

    def model(x_t, t):
        x = 2 * x_t.float() / (K - 1) - 1
        output = net(x, t - 1)
        if head == "logistic":
            mean, log_scale = output.chunk(2, dim=1)
            return discretized_logistic_logits((x + mean).tanh(), log_scale, K)
        return residual_logits(output.unflatten(1, (-1, K)).movedim(2, -1), x_t)

    return model


def text_model(net, K):
    """model(x_t, t) -> logits (B, L, K), from a network that takes t - 1 and returns logits of 27
    characters: state 27, the mask if K = 28, is never predicted."""
    return lambda x_t, t: F.pad(net(x_t, t - 1), (0, K - 27), value=-math.inf)


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # D3PM's best CIFAR-10 run, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=1_500_000, flip=True, dropout=0.1,  # App. B.2
    image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,  # DDPM's
    attention_resolutions=(16,), warmup=0, lr_decay=0.0, grad_clip=1.0,  # released code
    num_samples=100, sample_batch_size=64, log_every=100, save_every=5000,  # ours
    method=(("d3pm", "multinomial"), "which paper's settings"),
    transition=(("auto", "gaussian", "absorbing", "uniform"), "App. A.2; auto: the data set's"),
    T=(1000, "steps of the process (App. B.2)"),
    levels=(256, "K for images: bits/dim are those of K grey levels"),
    head=(("logistic", "residual"), "images: a logistic (App. A.8), or logits added to x_t"),
    hybrid=(0.001, "weight of the cross entropy, lambda in Eq. (5) (App. B.2)"),
    num_steps=(0, "steps of samples and bound, out of --T (Table 1); 0: all"),
    final_mode=(False, "end in the mode of p(x_0 | x_1) (released code)"),
    length=(256, "text: characters of a chunk"), layers=(12, "text: layers"),  # App. B.1
    width=(768, "text: channels"), heads=(12, "text: attention heads"),  # released code
    num_test=(64, "test examples to measure or to fill in"),
)
MNIST = dict(  # ours
    image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
    steps=50_000, flip=False, warmup=1000,
)
TEXT8 = dict(  # D3PM, App. B.1
    transition="absorbing", hybrid=0.01, dropout=0.0, lr=5e-4, batch_size=512, steps=1_000_000,
    warmup=10_000, lr_decay=0.5, ema_decay=0.0, grad_clip=0.25, flip=False, num_samples=16,
    num_test=32,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": dict(flip=False), "mnist": MNIST, "fashion_mnist": MNIST,
    # Not in the papers: for minutes on a laptop. T is the number of pixels; with so few steps
    # the cross entropy has to outweigh the bound.
    "digits": dict(
        transition="absorbing", levels=5, head="residual", hybrid=1.0, T=256, image_size=(16, 16),
        channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,),
        dropout=0.0, lr=8e-3, batch_size=64, steps=3400, flip=False, warmup=500, lr_decay=1.2,
        num_samples=64, num_test=50, save_every=500,
    ),
    "text8": TEXT8,
    "text": TEXT8 | dict(  # of a file: ours, for about 1 MB and minutes on a laptop
        layers=3, width=128, heads=4, lr=2e-3, batch_size=8, steps=3000, warmup=100,
        ema_decay=0.999, grad_clip=1.0, num_samples=8, num_test=8, save_every=500,
    ),
}
TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
ALPHABET = "abcdefghijklmnopqrstuvwxyz _"  # text: states 0..26, and 27, the mask


def is_text(dataset):
    return dataset == "text8" or Path(dataset).is_file()


def preset(args):
    text = is_text(args.dataset)
    name = args.dataset if args.dataset in PRESETS else "text" if text else "folder"
    changes = {"transition": "gaussian"} | PRESETS[name]
    if args.method == "multinomial":
        changes |= dict(transition="uniform", hybrid=0.0)
        if name == "text8":  # Argmax Flows, App. B: 300 epochs
            changes |= dict(width=512, heads=16, lr=1e-4, batch_size=32, steps=3_300_000, warmup=0,
                            lr_decay=0.0, grad_clip=0.0)
    transition = changes["transition"] if args.transition == "auto" else args.transition
    if transition != "gaussian" and not text:  # Table 3: the logistic head is for the Gaussian
        changes |= dict(head="residual")
    if transition == "uniform" and name in ("cifar10", "text", "text8"):  # Table 3; App. B.1
        changes |= dict(hybrid=0.0)
    if transition == "gaussian" and name == "digits":  # ours
        changes |= dict(levels=16, hybrid=0.01, T=100, lr=2e-3, warmup=200, lr_decay=0.5)
    return changes


def load_text(run):
    """The training and the test split, (N,) uint8 each, of --dataset, text8 (downloaded once) or
    the path of a UTF-8 file. 0..25 are the letters, 26 is what lies between words."""
    if run.dataset == "text8":
        path = Path(run.data_dir, "text8.zip")
        if RANK > 0:
            dist.barrier()  # only the first process downloads
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(urllib.request.urlretrieve(TEXT8_URL, f"{path}.part")[0], path)
            text = zipfile.ZipFile(path).read("text8").decode()
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"cannot read {path} or download it from {TEXT8_URL} ({error}); if "
                          "offline, put the file there") from error
        if RANK == 0 and WORLD > 1:
            dist.barrier()
    else:
        try:
            text = Path(run.dataset).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{run.dataset} is not a UTF-8 text: {error}") from error
        text = unicodedata.normalize("NFKD", text).casefold()  # accents become marks of their own
        text = re.sub("[\u0300-\u036f]", "", text)
        lost = re.sub(r"[a-z\W\d_]", "", text)
        if 2 * len(lost) > len(re.sub(r"[\W\d_]", "", text)):
            raise ValueError(f"{run.dataset}: most letters are not Latin and would be dropped: "
                             f"{''.join(sorted(set(lost))[:10])}")
        text = re.sub("[^a-z]+", " ", text)
    if len(text) < 40 * run.length:  # 2 chunks for testing
        raise ValueError(f"{run.dataset} has {len(text)} letters and spaces: --length "
                         f"{run.length} needs {40 * run.length}")
    letters = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8) - ord("a")
    letters = letters.clamp(max=26)  # the space is far above
    return letters[: len(text) * 9 // 10], letters[len(text) * 19 // 20 :]


def load_chunks(run):
    """As load_data, for text: a training chunk begins at every character; they share memory."""
    run.test = None
    try:
        train, test = load_text(run)
    except (ValueError, OSError) as error:
        if not run.checkpoint or run.task != "sample":
            raise
        print(f"process.txt lacks its first part: {error}")
        return None
    test = test.unfold(0, run.length, run.length)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(run.seed))
    run.test = test[order].to(run.device)
    return [train.to(run.device).unfold(0, run.length, 1)] if run.needs_data else None


def to_text(x):
    return "".join(ALPHABET[state] for state in x.tolist())


def to_states(run, batch):
    return batch.long() if run.text else batch.long() * run.levels // 256


def to_uint8(run, x):
    return (x * (255 / (run.levels - 1))).round().to(torch.uint8)


class Transformer(nn.Module):
    """forward(x (B, length) int64 in 0..27, t (B,)) -> logits of x_0 (B, length, 27)."""

    def __init__(self, length, width, layers, heads, dropout):
        super().__init__()
        if width % heads or width % 2 or width < 4:
            raise ValueError(f"--width {width} must be even, >= 4 and a multiple of --heads")
        torch.backends.mha.set_fastpath_enabled(False)  # on CUDA its GELU differs from training's
        self.token = nn.Embedding(len(ALPHABET), width)
        self.neighbours = nn.Conv1d(width, width, 9, padding=4)  # slow to learn by attention alone
        self.position = nn.Parameter(torch.randn(length, width))
        wide = nn.Linear(width, 4 * width)
        self.time_mlp = nn.Sequential(wide, nn.SiLU(), nn.Linear(4 * width, width))
        self.layers = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True,
                                       norm_first=True) for _ in range(layers)
        ])
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 27))
        nn.init.zeros_(self.out[1].weight)  # x_0 is uniform at first
        nn.init.zeros_(self.out[1].bias)

    def forward(self, x, t):
        temb = self.time_mlp(time_embedding(t, self.position.shape[1]))  # (B, width)
        h = self.token(x)  # (B, length, width)
        h = h + self.neighbours(h.transpose(1, 2)).transpose(1, 2)
        return self.out(self.layers(h + self.position + temb[:, None]))


def sample(run):
    """Samples; process: q(x_t | x_0) of a test example, then samples as they emerge."""
    record, texts = [], []

    def draw(first, n, record):
        x_T = run.process.prior_sample((n, *run.shape))
        return d3pm_sample(run.model, x_T, run.process, run.final_mode, record=record)

    if run.text:
        for first in range(0, run.num_samples, run.sample_batch_size):
            n = min(run.sample_batch_size, run.num_samples - first)
            seed_all(run.seed, "batch", first)
            texts += map(to_text, draw(first, n, None if first else record))
            print(f"{len(texts)} of {run.num_samples} texts")
        (run.out / "samples.txt").write_text("\n\n".join(texts) + "\n")
    else:
        images, record = save_images(lambda *batch: to_uint8(run, draw(*batch)), run)
        save_grid(images, run.out / "samples.png", columns=8)
    times, rows = [0, *record_steps(run.process.T)], []
    if record and run.test is not None:
        x_0 = to_states(run, run.test[:1]).expand(len(times), *run.shape)
        rows.append((times, run.process.q_sample(x_0, torch.tensor(times, device=run.device))))
    if record:  # (n, 16, ...): at the recorded steps, and x_0
        rows += [(times[::-1], x) for x in torch.stack(record, dim=1)[: 1 if run.text else 4]]
    if record and run.text:
        parts = ["".join(f"{run.tau[t]:5d}  {to_text(x)}\n" for t, x in zip(*row, strict=True))
                 for row in rows]
        (run.out / "process.txt").write_text("\n".join(parts))
    elif record:
        states = torch.cat([states for _, states in rows])
        save_grid(to_uint8(run, states), run.out / "process.png", columns=len(times))
    return {"n": run.num_samples, "final_mode": run.final_mode, **run.measured}


def bpd(run):
    run.bf16, x_0 = False, to_states(run, run.test[: run.num_test])
    parts = [bits_per_dim(run.model, x, run.process) for x in x_0.split(run.sample_batch_size)]
    bits = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    bits["L_t"], n = bits["L_t"].sum(1), len(x_0)
    mean = {key: value.mean().item() for key, value in bits.items()}
    mean["standard_error"] = bits["total"].std().item() / math.sqrt(n)
    unit = "bits/char" if run.text else "bits/dim"
    print(f"test {unit} <= " + "{total:.4f} +- {standard_error:.4f}, of which L_T {L_T:.6f}, L_1 "
          "to L_T-1 {L_t:.4f}, L_0 {L_0:.4f}; n = ".format(**mean) + str(n))
    return {"n": n, "split": "test", unit.replace("/", "_per_"): mean, **run.measured}


def filling(run):
    """Test examples of which the first half is known, then a random half."""
    x, completions, rows = to_states(run, run.test[: run.num_test]), 3, []
    places = run.shape[-1:] if run.text else run.shape[-2:]
    first = torch.arange(math.prod(places), device=run.device) < math.prod(places) // 2
    for known in (first, torch.rand(len(first), device=run.device) < 0.5):
        known = known.view(places)
        parts = x.repeat_interleave(completions, 0).split(run.sample_batch_size)
        filled = torch.cat([infill(run.model, part, known, run.process) for part in parts])
        filled = filled.unflatten(0, (-1, completions))  # (n, 3, ...)
        given = torch.where(known, x, run.process.mask)
        rows.append(torch.cat([given[:, None], filled, x[:, None]], dim=1).flatten(0, 1))
    if run.text:
        texts = ["\n".join(map(to_text, row)) for row in torch.cat(rows).split(completions + 2)]
        (run.out / "infill.txt").write_text("\n\n".join(texts) + "\n")
    else:
        save_grid(to_uint8(run, torch.cat(rows)), run.out / "infill.png", completions + 2)
    return {"n": len(x), "split": "test", "completions": completions, **run.measured}


TASKS = {"sample": sample, "bpd": bpd, "infill": filling}


def check(run):
    """Set run.text. ValueError for what does not go together."""
    run.text, saved = is_text(run.dataset), run.loaded and run.loaded["settings"]
    if saved:
        was_text = saved["image_channels"] == 0
        if run.dataset != saved["dataset"] and run.text != was_text:
            raise ValueError(f"--dataset {run.dataset}: the checkpoint is of "
                             f"{'text' if was_text else 'images'}")
        run.text = was_text  # the file may be gone
    if run.transition == "auto":
        run.transition = preset(run)["transition"]
    if run.text and run.flip:
        raise ValueError("--flip mirrors images, not text")
    if run.method == "multinomial" and (run.transition != "uniform" or run.hybrid):
        raise ValueError("--method multinomial is the uniform transition with --hybrid 0")
    if run.task == "infill" and run.transition != "absorbing":
        raise ValueError("--task infill needs --transition absorbing, in training too")
    if run.num_steps > run.T:
        raise ValueError(f"--num-steps {run.num_steps} is more than --T {run.T}")


def main(argv=None):
    with one_line_errors():
        fixed = ("transition", "T", "levels", "head", "length", "layers", "width", "heads")
        run = read_args(argv, SETTINGS, preset, TASKS, fixed)
        check(run)
        masks = run.text and run.transition == "absorbing"
        K = 27 + masks if run.text else run.levels
        process = CategoricalDiffusion(K, run.T, run.transition, mask=27 if masks else None)
        setup(run)
        process.to(run.device)
        if run.text:
            data, run.shape = load_chunks(run), (run.length,)
            net = Transformer(run.length, run.width, run.layers, run.heads, run.dropout)
            model = text_model(prepare(run, net), K)
        else:
            data = load_data(run)
            C, run.shape = run.image_channels, (run.image_channels, *run.image_size)
            net = UNet(C, 2 * C if run.head == "logistic" else K * C, **run.unet)
            model = image_model(prepare(run, net), K, run.head)
        steps, run.model, run.process = run.num_steps or run.T, model, process
        run.tau = [run.T * i // steps for i in range(steps + 1)]
        if steps < run.T:
            run.model, run.process = skip_steps(model, process, run.tau[1:])
        if data:
            fit(net, lambda batch: d3pm_loss(model, to_states(run, batch), process, run.hybrid),
                data[:1], run)
        run.measured = dict(method=run.method, hybrid=run.hybrid, transition=run.transition,
                            T=run.T, K=K, evaluations=steps)
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
