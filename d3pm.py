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
import copy
import datetime
import glob
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
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
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
        """Move the tables, in place like a module; mps alone has no float64."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name in {"beta", "prior", "alpha_bar", "matrices", "products"} & vars(self).keys():
            setattr(self, name, getattr(self, name).to(device, dtype))
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


@torch.no_grad()
def d3pm_sample(model, x_T, diffusion, final_mode=False, t_start=None, callback=None):
    """x_T ~ p(x_T) -> x_0, like x_T (B, ...), in T evaluations of the model. final_mode: x_0 is the
    mode of p(x_0 | x_1), as released, and not drawn. t_start: begin at this step, with x_T as its
    x_t. callback(t, x_t) is called with every state, (T, x_T), or (t_start, x_T), to (0, x_0)."""
    callback = (lambda t, x_t: None) if callback is None else callback
    x_t = x_T
    for step in range(diffusion.T if t_start is None else t_start, 0, -1):
        callback(step, x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        probs = model(x_t, t).softmax(-1)  # p~(x_0 | x_t), at t = 1 this is p(x_0 | x_1)
        if step > 1:
            probs = diffusion.posterior(probs, x_t, t)  # D3PM Eq. (4)
        x_t = probs.argmax(-1) if final_mode and step == 1 else categorical(probs)
    callback(0, x_t)
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


def infill(model, x, known, diffusion, callback=None):
    """x_0 like x (B, ...) whose positions are x's where known is True; known broadcasts against x.
    The others begin as masks, at the t that masks that many on average. Known positions are
    predicted with certainty and stay: in Eq. (4) only a mask changes. callback: d3pm_sample's.
    ValueError: not absorbing."""
    if diffusion.transition != "absorbing":
        raise ValueError("only the absorbing transition marks the positions to fill in")
    certain = F.one_hot(x, diffusion.K).log()  # 0 at x, -inf elsewhere

    def informed(x_t, t):
        return torch.where(known[..., None], certain, model(x_t, t))

    masked = 1 - known.to(diffusion.beta.dtype).mean()
    t_start = max(1, int((1 - diffusion.alpha_bar[1:] <= masked + 1e-9).sum()))  # rounding aside
    x_t = torch.where(known, x, diffusion.mask)
    return d3pm_sample(informed, x_t, diffusion, t_start=t_start, callback=callback)


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

METHOD = "d3pm"  # in checkpoints
# a checkpoint decides these
FIXED = ("transition", "T", "levels", "head", "length", "layers", "width", "heads")
READS = {}  # other methods' checkpoints, and settings that these lack
SETTINGS = dict(  # D3PM's best CIFAR-10 run, with sources; every key is a flag
    lr=2e-4, batch_size=128, ema_decay=0.9999, steps=1_500_000, flip=True, dropout=0.1,  # App. B.2
    image_size=[32, 32], channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2,  # DDPM's
    attention_resolutions=[16], warmup=0, grad_clip=1.0,  # released code
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
    image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], attention_resolutions=[14],
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
        transition="absorbing", levels=5, head="residual", hybrid=1.0, T=256, image_size=[16, 16],
        channels=16, channel_mult=[1, 2, 4], num_res_blocks=1, attention_resolutions=[8],
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


def load_text(args):
    """The training and the test split, (N,) uint8 each, of --dataset, text8 (downloaded once) or
    the path of a UTF-8 file. 0..25 are the letters, 26 is what lies between words."""
    path, is_text8 = Path(args.dataset), args.dataset == "text8"
    if is_text8:
        path = Path(args.data_dir, "text8.zip")
        if LOCAL_RANK == 0 and not path.exists():  # the first process of each machine
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(urllib.request.urlretrieve(TEXT8_URL, f"{path}.part")[0], path)
        if WORLD > 1:
            dist.barrier()
    try:
        data = zipfile.ZipFile(path).read("text8") if is_text8 else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not text8.zip or a UTF-8 text: {error}") from error
    text = unicodedata.normalize("NFKD", text).casefold()  # accents become marks of their own
    text = re.sub("[^a-z]+", " ", re.sub("[\u0300-\u036f]", "", text))
    if len(text) < 40 * args.length:  # 2 chunks for testing
        raise ValueError(f"{path} has {len(text)} characters of a to z and spaces: --length "
                         f"{args.length} needs {40 * args.length}")
    letters = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8) - ord("a")
    letters = letters.clamp(max=26)  # the space is far above
    return letters[: len(text) * 9 // 10], letters[len(text) * 19 // 20 :]


def to_text(x):
    return "".join(ALPHABET[state] for state in x.tolist())


def of_text(args):
    return args.image_channels == 0  # main has measured it


def to_states(args, batch):
    return batch.long() if of_text(args) else batch.long() * args.levels // 256


def to_uint8(args, x):
    return (x * (255 / (args.levels - 1))).round().to(torch.uint8)


def test_states(args, device):
    """x_0 of the first test images, or of chunks of the test text, evenly spaced."""
    if not of_text(args):
        return to_states(args, load_images(args, device, args.num_test)[0])
    chunks = load_text(args)[1].unfold(0, args.length, args.length)
    few = chunks[:: max(1, len(chunks) // args.num_test)][: args.num_test]
    return to_states(args, few.to(device))


class Transformer(nn.Module):
    """forward(x (B, length) int64 in 0..27, t (B,)) -> logits of x_0 (B, length, 27)."""

    def __init__(self, length, width, layers, heads, dropout):
        super().__init__()
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


def model_of(args, net, K):
    return text_model(net, K) if of_text(args) else image_model(net, K, args.head)


def in_fewer_steps(args, net, process):
    """The model, its process and their times in --num-steps steps."""
    model, steps = model_of(args, net, process.K), args.num_steps or args.T
    tau = [args.T * i // steps for i in range(steps + 1)]
    if steps < args.T:
        model, process = skip_steps(model, process, tau[1:])
    return model, process, tau


def draw(args, model, process, n, callback=None):
    shape = (args.length,) if of_text(args) else (args.image_channels, *args.image_size)
    x_T = process.prior_sample((n, *shape))
    return d3pm_sample(model, x_T, process, args.final_mode, callback=callback)


def preview(args, net, process):
    model, process, _ = in_fewer_steps(args, net, process)
    return to_uint8(args, draw(args, model, process, args.preview))


def sample(args, device, net, process):
    model, process, tau = in_fewer_steps(args, fast(net, args, device), process)
    states, texts = {}, []
    for first, n in batches(args):
        x_0 = draw(args, model, process, n, partial(keep, states))
        if of_text(args):
            texts += map(to_text, x_0)
        else:
            save_images(to_uint8(args, x_0), first, args)
    if of_text(args):  # each process writes its own samples, the first one how a text emerged
        name = f"samples-{RANK}.txt" if RANK else "samples.txt"
        Path(args.out, name).write_text("\n\n".join(texts) + "\n")
        if RANK == 0:
            lines = [f"{tau[t]:5d}  {to_text(x[0])}\n" for t, x in states.items()]
            Path(args.out, "process.txt").write_text("".join(lines))
    else:
        save_pictures(args, states, lambda x: to_uint8(args, x))
    return {"n": args.num_samples, "evaluations": process.T}


def bpd(args, device, net, process):
    model, process, _ = in_fewer_steps(args, net, process)
    x_0 = test_states(args, device)
    parts = [bits_per_dim(model, x, process) for x in x_0.split(args.sample_batch_size)]
    bits = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    bits["L_t"], n = bits["L_t"].sum(1), len(x_0)
    mean = {key: value.mean().item() for key, value in bits.items()}
    mean["standard_error"] = round(bits["total"].std().item() / n**0.5, 4) if n > 1 else None
    unit = "bits/char" if of_text(args) else "bits/dim"
    print(f"test {unit} <= " + "{total:.4f} +- {standard_error}, of which L_T {L_T:.6f}, L_1 to "
          "L_T-1 {L_t:.4f}, L_0 {L_0:.4f}; n = ".format(**mean) + str(n))
    return {"n": n, "split": "test", unit.replace("/", "_per_"): mean}


def filling(args, device, net, process):
    """Test examples of which the first half is known, then a random half."""
    model = model_of(args, fast(net, args, device), process.K)
    x, completions, rows = test_states(args, device), 3, []
    places = x.shape[1:] if of_text(args) else x.shape[2:]
    first = torch.arange(math.prod(places), device=device) < math.prod(places) // 2
    for known in (first, torch.rand(len(first), device=device) < 0.5):
        known = known.view(places)
        parts = x.repeat_interleave(completions, 0).split(args.sample_batch_size)
        filled = torch.cat([infill(model, part, known, process) for part in parts])
        filled = filled.unflatten(0, (-1, completions))  # (n, 3, ...)
        given = torch.where(known, x, process.mask)
        rows.append(torch.cat([given[:, None], filled, x[:, None]], dim=1).flatten(0, 1))
    if of_text(args):
        texts = ["\n".join(map(to_text, row)) for row in torch.cat(rows).split(completions + 2)]
        if RANK == 0:
            Path(args.out, "infill.txt").write_text("\n\n".join(texts) + "\n")
    else:
        path = Path(args.out, "infill.png")
        save_grid(to_uint8(args, torch.cat(rows)), path, completions + 2)
    return {"n": len(x), "split": "test", "completions": completions}


TASKS = {"sample": sample, "bpd": bpd, "infill": filling}


def check(args, loaded, text):
    """ValueError for what does not go together."""
    if loaded and args.dataset != loaded["settings"]["dataset"] and text != is_text(args.dataset):
        kind = "text" if text else "images"
        raise ValueError(f"--dataset {args.dataset}: the checkpoint is of {kind}")
    if text and args.flip:
        raise ValueError("--flip mirrors images, not text")
    if args.method == "multinomial" and (args.transition != "uniform" or args.hybrid):
        raise ValueError("--method multinomial is the uniform transition with --hybrid 0")
    if args.task == "infill" and args.transition != "absorbing":
        raise ValueError("--task infill needs --transition absorbing, in training too")
    if args.num_steps > args.T:
        raise ValueError(f"--num-steps {args.num_steps} is more than --T {args.T}")
    if args.transition == "gaussian" and 0 < args.num_steps < args.T:
        raise ValueError("--num-steps: the Gaussian transition has no closed form to skip steps")


def make_network(args, K):
    if of_text(args):
        return Transformer(args.length, args.width, args.layers, args.heads, args.dropout)
    C, options = args.image_channels, {key: getattr(args, key) for key in UNET}
    return UNet(C, 2 * C if args.head == "logistic" else K * C, **options)


def main(argv=None):
    args, loaded, trains = read_args(argv)
    text = args.image_channels == 0 if loaded else is_text(args.dataset)  # its file may be gone
    check(args, loaded, text)
    masks = text and args.transition == "absorbing"
    K = 27 + masks if text else args.levels
    process = CategoricalDiffusion(K, args.T, args.transition, mask=27 if masks else None)
    device = setup(args)
    process.to(device)
    if trains and text:  # a chunk begins at every character; they share memory
        data = load_text(args)[0].to(device).unfold(0, args.length, 1)
        args.image_channels = 0
    elif trains:
        data, _ = load_images(args, device)
        args.image_channels = data.shape[1]
    net = make_network(args, K).to(device)
    if trains:
        fit(net, lambda model, x: d3pm_loss(model_of(args, model, K), to_states(args, x), process,
                                            args.hybrid), [data], args, device, loaded,
            None if text else lambda ema: preview(args, ema, process))
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
