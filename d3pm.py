"""Diffusion on categories: Multinomial Diffusion (Hoogeboom et al. 2021, arXiv:2102.05379) and D3PM
(Austin, Johnson, Ho, Tarlow, van den Berg 2021, arXiv:2107.03006), whose numbers stand below.

Implements: Eq. (1), (2), (3), (4), (5), (18); Table 1.

    t               time, 1 (almost data) ... T (noise)         (B,) int64; the network is fed t - 1
    x_0, x_t        data, and data after t steps of noise       (B, ...) int64 in 0..K-1
    Q, Q_bar        one step's matrix; product of steps 1..t    (K, K), [i, j]: from i to j
    beta            probability of a step's jump; Gaussian:     (T + 1,), index = t, beta[0] = 0
                    their variance is beta / 2
    alpha_bar       product of 1 - beta_1 ... 1 - beta_t        (T + 1,), alpha_bar[0] = 1
    model(x_t, t)   the network: logits of p~(x_0 | x_t)        (B, ..., K)

    python d3pm.py                                              train on digits, sample, bits/dim
    python d3pm.py --dataset cifar10                            the paper's best run
    python d3pm.py --dataset text8                              text; or any file: --dataset FILE
    python d3pm.py --method multinomial                         the first paper's method
    python d3pm.py --checkpoint runs/d3pm-digits/checkpoint.pt --task infill

One posterior serves both papers: theta_post of the first is Eq. (4) with the uniform transition.
Measured results stand in README.md. Deviations from the papers:
1. The hybrid loss as released: one random term of L_vb, without the factor T, + hybrid * CE; a mean
   over positions, in nats (released: bits for images, a sum for text, which clipping notices).
2. The Gaussian's beta is multiplied by 1000 / T where T < 1000, so that the noise still mixes.
3. x_t is drawn from q itself; the released code adds 1e-6 to every probability.
4. EMA decay min(decay, (1 + n) / (10 + n)) after n steps.
5. Text: one Transformer of torch's layers for both papers, with a convolution before it.
6. --method multinomial: t is uniform and the learning rate constant, as in D3PM.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

# ---- The method ----------------------------------------------------------------------------------


def uniform_matrix(K, beta):
    """(K, K) float64, App. A.2.1: with probability beta the state is drawn anew, uniformly."""
    eye = torch.eye(K, dtype=torch.float64)
    return (1 - beta) * eye + beta / K  # Eq. (2)


def absorbing_matrix(K, beta, mask):
    """(K, K) float64, App. A.2.2: with probability beta the state becomes mask, for good."""
    Q = (1 - beta) * torch.eye(K, dtype=torch.float64)
    Q[:, mask] += beta  # Eq. (2)
    return Q


def gaussian_matrix(K, beta):
    """(K, K) float64, App. A.2.3: jumps from a discretised Gaussian, whose variance is beta / 2 on
    states scaled to [-1, 1]. A jump that would leave 0..K-1 is not made, so that Q is symmetric."""
    jump = torch.arange(1 - K, K, dtype=torch.float64)
    weight = (-4 * jump.square() / ((K - 1) ** 2 * beta)).softmax(0)  # (2 K - 1,)
    state = torch.arange(K)
    Q = weight[state - state[:, None] + K - 1].fill_diagonal_(0)
    return Q + (1 - Q.sum(1)).diag()  # Eq. (2)


def published_beta(transition, T):
    """(T + 1,) float64: the schedule that the papers take for a transition, index = t."""
    t = torch.arange(T + 1, dtype=torch.float64)
    if transition == "uniform":
        alpha_bar = ((t / T + 0.008) / 1.008 * math.pi / 2).cos()  # Eq. (18), "+ pi/2" a misprint
        later = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)  # the cap: released code
    elif transition == "absorbing":
        later = 1 / (T - t[1:] + 1)  # Sec. 3.1: x_0 has lost t / T of its states after t steps
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
    # of K alarm clocks with these rates, which one rings first: exact; multinomial waits for a GPU
    return (probs / torch.empty_like(probs).exponential_().clamp(min=1e-30)).argmax(-1)


class CategoricalDiffusion:
    """The forward process q on K states: independent for every position of x (B, ...).

    transition "uniform" or "absorbing": a state stays with probability 1 - beta and is else drawn
    from `prior`, so that everything is a closed form in beta and alpha_bar. "gaussian": the T
    matrices and their products are tables, `matrices` and `products` (T + 1, K, K). Tables are
    float64. beta (T + 1,): of the steps, None for the published ones; mask: the absorbing state,
    None for K // 2. ValueError: anything undefined, or the published Gaussian where K < 16, whose
    neighbours are too far apart for it to mix.
    """

    def __init__(self, K, T, transition="uniform", beta=None, mask=None):
        if transition not in ("uniform", "absorbing", "gaussian"):
            raise ValueError(f"transition {transition!r} is not uniform, absorbing or gaussian")
        if K < 2 or T < 1:
            raise ValueError(f"K = {K} states, T = {T} steps: not K >= 2, T >= 1")
        if mask is not None and (transition != "absorbing" or not 0 <= mask < K):
            raise ValueError(f"mask {mask}: only an absorbing transition has one, in 0..{K - 1}")
        if beta is None and transition == "gaussian" and K < 16:
            raise ValueError(f"the Gaussian's published beta needs K >= 16 states, not {K}")
        if beta is None:
            beta = published_beta(transition, T)
        else:
            beta, most = beta.double(), math.inf if transition == "gaussian" else 1
            inside = (beta[1:] > 0) & (beta[1:] <= most)
            if beta.shape != (T + 1,) or beta[0] != 0 or not inside.all():
                raise ValueError(f"beta is not 0 and then {T} numbers in (0, {most}]")
        self.K, self.T, self.transition, self.beta, self.mask = K, T, transition, beta, mask
        self.prior = torch.full((K,), 1 / K, dtype=torch.float64)
        if transition == "absorbing":
            self.mask = K // 2 if mask is None else mask
            self.prior = torch.zeros(K, dtype=torch.float64)
            self.prior[self.mask] = 1
        if transition == "gaussian":
            self.matrices = torch.eye(K, dtype=torch.float64).repeat(T + 1, 1, 1)
            self.products = self.matrices.clone()
            for t in range(1, T + 1):
                self.matrices[t] = gaussian_matrix(K, beta[t])
                self.products[t] = self.products[t - 1] @ self.matrices[t]  # Q_bar_t of Eq. (3)
        else:
            self.alpha_bar = (1 - beta).cumprod(0)

    def to(self, device):
        """Move the tables, in place as a module does it (float32 on mps, which has no float64)."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name in {"beta", "prior", "alpha_bar", "matrices", "products"} & vars(self).keys():
            setattr(self, name, getattr(self, name).to(device, dtype))
        return self

    def closed_form_matrix(self, jump):
        """(K, K): each state stays with probability 1 - jump and is else drawn from the prior."""
        if self.transition == "uniform":
            return uniform_matrix(self.K, jump.item())
        return absorbing_matrix(self.K, jump.item(), self.mask)

    def Q(self, t):
        """(K, K), t an int in 0..T; for looking at: only the Gaussian computes with matrices."""
        if self.transition == "gaussian":
            return self.matrices[t]
        return self.closed_form_matrix(self.beta[t])

    def Q_bar(self, t):
        """(K, K): Q_1 Q_2 ... Q_t, t an int in 0..T."""
        if self.transition == "gaussian":
            return self.products[t]
        return self.closed_form_matrix(1 - self.alpha_bar[t])

    def marginal(self, x_0_probs, t):
        """x_0_probs Q_bar_t, like x_0_probs (B, ..., K); t (B,) in 0..T."""
        if self.transition == "gaussian":
            Q_bar = self.products[t].to(x_0_probs.dtype)  # (B, K, K)
            flat = x_0_probs.reshape(len(Q_bar), -1, self.K)
            return (flat @ Q_bar).view_as(x_0_probs)  # Eq. (3)
        alpha_bar = self.alpha_bar[t]
        stay, jump = expand(alpha_bar, x_0_probs), expand(1 - alpha_bar, x_0_probs)
        return stay * x_0_probs + jump * self.prior.to(x_0_probs.dtype)  # Eq. (3)

    def likelihood(self, x_t, t, dtype):
        """x_t Q_t^T (B, ..., K): q(x_t | x_{t-1}) of every x_{t-1}; t (B,) in 1..T."""
        if self.transition == "gaussian":
            return rows(self.matrices[t].to(dtype), x_t)  # Q is symmetric
        here = F.one_hot(x_t, self.K).to(dtype)
        stay, jump = expand(1 - self.beta[t], here), expand(self.beta[t], here)
        return stay * here + jump * self.prior.to(dtype)[x_t].unsqueeze(-1)

    def q_probs(self, x_0, t, dtype=None):
        """q(x_t | x_0) (B, ..., K), Eq. (3), in the tables' precision or in dtype; t in 0..T."""
        dtype = dtype or self.beta.dtype
        if self.transition == "gaussian":
            return rows(self.products[t].to(dtype), x_0)  # Eq. (3)
        return self.marginal(F.one_hot(x_0, self.K).to(dtype), t)

    def q_sample(self, x_0, t):
        """x_t ~ q(x_t | x_0), like x_0 (B, ...) int64; t (B,) in 0..T."""
        if self.transition == "gaussian":
            return categorical(self.q_probs(x_0, t, torch.float32))
        u = torch.rand(x_0.shape, device=x_0.device)
        return torch.where(u < expand(self.alpha_bar[t], u), x_0, self.prior_sample(x_0.shape))

    def prior_sample(self, shape):
        """x_T ~ p(x_T), int64 of this shape: what q(x_T | x_0) comes to, whatever x_0."""
        if self.transition == "absorbing":
            return torch.full(shape, self.mask, device=self.beta.device)
        return torch.randint(self.K, shape, device=self.beta.device)

    def posterior(self, x_0_probs, x_t, t):
        """Probabilities of x_{t-1}, like x_0_probs (B, ..., K); x_t (B, ...), t (B,) in 1..T.

        A one-hot x_0 gives q(x_{t-1} | x_t, x_0), Eq. (3); a prediction p~(x_0 | x_t) gives
        p(x_{t-1} | x_t), Eq. (4): x_t Q_t^T has no x_0 in it, so that the sum over x_0 of the joint
        probabilities (not of posteriors, each of its own norm) is the same formula.
        Where x_t cannot come from x_0 it is uniform: finite always.
        """
        return self.bayes(self.marginal(x_0_probs, t - 1), x_t, t)  # Eq. (4)

    def q_posterior(self, x_0, x_t, t, dtype):
        """q(x_{t-1} | x_t, x_0) (B, ..., K) in dtype: posterior with one-hot x_0, in less work."""
        return self.bayes(self.q_probs(x_0, t - 1, dtype), x_t, t)  # Eq. (3)

    def bayes(self, probs, x_t, t):
        """Probabilities of x_{t-1} given x_t from those before x_t was seen, both (B, ..., K)."""
        product = self.likelihood(x_t, t, probs.dtype) * probs
        product = product + 1e-30  # far below every probability that matters
        return product / product.sum(-1, keepdim=True)  # Eq. (3), (4)


def bound_terms(log_p_0, x_0, x_t, t, diffusion):
    """L_vb's term at t and the cross entropy -log p~(x_0 | x_t), in nats, like x_0 (B, ...).

    log_p_0 (B, ..., K): log p~(. | x_t). The term is L_{t-1} of Eq. (1), a KL divergence; at t = 1
    it is L_0, where both papers let p(x_0 | x_1) be the prediction itself.
    """
    cross_entropy = -log_p_0.gather(-1, x_0[..., None]).squeeze(-1)
    q = diffusion.q_posterior(x_0, x_t, t, log_p_0.dtype)  # Eq. (3)
    p = diffusion.posterior(log_p_0.exp(), x_t, t)  # Eq. (4)
    divergence = (q * (q.log() - p.log())).sum(-1)
    return torch.where(expand(t, x_0) == 1, cross_entropy, divergence), cross_entropy  # Eq. (1)


def d3pm_loss(model, x_0, diffusion, hybrid=0.001):
    """L_lambda with lambda = hybrid, in nats, mean over the batch and all positions of x_0.

    One term of L_vb, at a random t, so that T times its mean (and L_T, which has no parameters) is
    the bound; hybrid weighs the cross entropy against this one term, as released. hybrid = 0 is
    the bound alone, as in Multinomial Diffusion.
    """
    t = torch.randint(1, diffusion.T + 1, (len(x_0),), device=x_0.device)
    x_t = diffusion.q_sample(x_0, t)
    log_p_0 = model(x_t, t).log_softmax(-1)
    term, cross_entropy = bound_terms(log_p_0, x_0, x_t, t, diffusion)
    return term.mean() + hybrid * cross_entropy.mean()  # Eq. (5)


def record_steps(T):
    """The at most 15 evenly spaced steps of 1..T whose states a sampler records, ascending."""
    return sorted({-(-T * k // 15) for k in range(1, 16)})


@torch.no_grad()
def d3pm_sample(model, x_T, diffusion, final_mode=False, t_start=None, record=None):
    """x_T ~ p(x_T) -> x_0, like x_T (B, ...), in T evaluations of the model.

    Every step is drawn; final_mode: x_0 is the mode of p(x_0 | x_1), as released. t_start: begin at
    this step, with x_T as its x_t. record: a list that gets x_t at the steps of record_steps, from
    t_start down, and x_0.
    """
    x_t, t_start = x_T, diffusion.T if t_start is None else t_start
    recorded = () if record is None else record_steps(t_start)
    for step in range(t_start, 0, -1):
        if step in recorded:
            record.append(x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        probs = model(x_t, t).softmax(-1)  # p~(x_0 | x_t), at t = 1 this is p(x_0 | x_1)
        if step > 1:
            probs = diffusion.posterior(probs, x_t, t)  # Eq. (4)
        mode = final_mode and step == 1
        x_t = probs.argmax(-1) if mode else categorical(probs)
    if record is not None:
        record.append(x_t)
    return x_t


def skip_steps(model, diffusion, tau):
    """The model and its process as one of len(tau) steps that go from tau[i] to tau[i - 1]: Table 1
    with 256 and 20 steps; tau: ascending ints in 1..T, the last T. For every function here.

    Eq. (4) holds for such a step with Q_{s+1} ... Q_t for Q_t: a closed form for the uniform and
    the absorbing transition, in 1 - beta = alpha_bar_t / alpha_bar_s. ValueError for the Gaussian.
    """
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
    """The variational bound on -log2 p(x_0) per position, each term of Eq. (1) with one x_t.

    Returns, in bits per position of x_0 (B, ...), "total" (B,), "L_T" (B,), "L_t" (B, T - 1): the
    terms of t = 2..T in this order, and "L_0" (B,).
    """
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
    return {"total": L_T + L_t.sum(1) + L_0, "L_T": L_T, "L_t": L_t, "L_0": L_0}  # Eq. (1)


def infill(model, x, known, diffusion, record=None):
    """x_0 like x (B, ...) whose positions are x's where known is True; known broadcasts against x.

    Absorbing only. The other positions begin as masks, at the t that masks so many on average (data
    that can be in the mask's state, as images can, is in it a little too often). Predicting what
    is known with certainty keeps it, as Eq. (4) never leaves a state that is no mask.
    """
    if diffusion.transition != "absorbing":
        raise ValueError("only the absorbing transition says which positions are to be filled in")
    certain = F.one_hot(x, diffusion.K).log()  # 0 at x, -inf elsewhere

    def informed(x_t, t):
        return torch.where(known[..., None], certain, model(x_t, t))

    masked = 1 - known.to(diffusion.beta.dtype).mean()
    t_start = max(1, int((1 - diffusion.alpha_bar[1:] <= masked + 1e-9).sum()))  # rounding aside
    x_t = torch.where(known, x, diffusion.mask)
    return d3pm_sample(informed, x_t, diffusion, t_start=t_start, record=record)


# The heads of D3PM's image networks


def residual_logits(output, x_t):
    """Logits (..., K) of x_0 from the network's (..., K): the state of x_t is ahead by 1."""
    return output + F.one_hot(x_t, output.shape[-1])  # released code, not in the paper


def discretized_logistic_logits(mean, log_scale, K):
    """Logits (..., K) of a logistic distribution cut to K equal bins around -1 ... 1, App. A.8.

    mean, log_scale (...): the network's; its scale is exp(log_scale - 2), as released.
    """
    half = 1 / (K - 1)  # of a bin's width
    centre = torch.linspace(-1, 1, K, dtype=mean.dtype, device=mean.device) - mean[..., None]
    sharpness = (2 - log_scale[..., None]).exp()
    upper, lower = (centre + half) * sharpness, (centre - half) * sharpness
    # log(sigmoid(u) - sigmoid(l)) = log sigmoid(u) + log sigmoid(-l) + log(1 - exp(l - u)): the
    # last is the same for all bins, so that the softmax, which cuts off the tails, removes it
    return F.logsigmoid(upper) + F.logsigmoid(-lower)


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

import urllib.request

from unet import time_embedding

TEXT8 = "http://mattmahoney.net/dc/text8.zip"
ALPHABET = "abcdefghijklmnopqrstuvwxyz _"  # text: states 0..26, and 27, the mask

PRESETS = {
    "cifar10": dict(  # D3PM, App. B.2: Gauss + logistic, L_lambda, the best row of Table 3
        transition="gaussian", levels=256, head="logistic", hybrid=0.001, T=1000,
        image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
        attention_resolutions=(16,), dropout=0.1, lr=2e-4, batch_size=128, steps=1_500_000,
        ema_decay=0.9999, flip=True, warmup=0, lr_decay=0.0, grad_clip=1.0,
        num_samples=100, sample_batch_size=64, num_test=64, log_every=100, save_every=5000,  # ours
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(flip=False),  # of any images
    # Digits are not in the papers: these are ours, sized for minutes on a laptop. T is their number
    # of pixels; hybrid, for so few steps, lets the cross entropy outweigh the bound.
    digits=PRESETS["cifar10"] | dict(
        transition="absorbing", levels=5, head="residual", hybrid=1.0, T=256, image_size=(16, 16),
        channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,),
        dropout=0.0, lr=8e-3, batch_size=64, steps=3400, flip=False, warmup=500, lr_decay=1.2,
        num_samples=64, num_test=50, save_every=500,
    ),
    mnist=PRESETS["cifar10"] | dict(  # ours
        image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
        steps=50_000, flip=False, warmup=1000,
    ),
    text8=PRESETS["cifar10"] | dict(  # D3PM, App. B.1
        transition="absorbing", hybrid=0.01, layers=12, width=768, heads=12, length=256,
        dropout=0.0, lr=5e-4, batch_size=512, steps=1_000_000, warmup=10_000, lr_decay=0.5,
        ema_decay=0.0, grad_clip=0.25, flip=False, num_samples=16, num_test=32,
    ),
)
PRESETS.update(
    fashion_mnist=PRESETS["mnist"],
    text=PRESETS["text8"] | dict(  # a file's: ours, for about 1 MB and minutes on a laptop
        layers=3, width=128, heads=4, lr=2e-3, batch_size=8, steps=3000, warmup=100,
        ema_decay=0.999, grad_clip=1.0, num_samples=8, num_test=8, save_every=500,
    ),
)
for name in list(PRESETS):  # Table 3 has the logistic head for the Gaussian alone; text: App. B.1
    other = dict(hybrid=0.0) if name.startswith("text") else dict(head="residual")
    PRESETS[f"{name} --transition uniform"] = other
    PRESETS[f"{name} --method multinomial"] = other | dict(transition="uniform", hybrid=0.0)
    if not name.startswith("text"):
        PRESETS[f"{name} --transition absorbing"] = other
# Table 3: by L_vb alone
PRESETS["cifar10 --transition uniform"] = dict(head="residual", hybrid=0.0)
# T = 100: of 1000 steps the first hundreds would hardly leave one of 16 levels for the next
PRESETS["digits --transition gaussian"] = dict(
    levels=16, hybrid=0.01, T=100, lr=2e-3, warmup=200, lr_decay=0.5,
)
PRESETS["text8 --method multinomial"] |= dict(  # Argmax Flows, App. B: 300 epochs
    width=512, heads=16, lr=1e-4, batch_size=32, steps=3_300_000, warmup=0, lr_decay=0.0,
    grad_clip=0.0,
)


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], ("sample", "bpd", "infill"))
    add, count, flag = parser.add_argument, number(int, 1), argparse.BooleanOptionalAction
    transitions = ("uniform", "absorbing", "gaussian")
    add("--method", choices=("d3pm", "multinomial"), default="d3pm", help="which paper's settings")
    add("--transition", choices=transitions, help="of the forward process (D3PM, App. A.2)")
    add("--T", type=number(int, 1, 10_000), help="steps of the process")
    add("--levels", type=number(int, 2, 256), help="K of images, whose bits/dim are of K levels")
    add("--head", choices=("logistic", "residual"), help="images: logits are a logistic's (D3PM, "
        "App. A.8), or any of their own beside x_t's one-hot")
    add("--hybrid", type=number(float, 0), help="weight of the cross entropy, lambda in Eq. (5)")
    add("--num-steps", type=count, help="of --T: samples and bound skip the others (Table 1)")
    add("--final-mode", action=flag, default=False, help="end in p(x_0 | x_1)'s mode, as released")
    add("--num-test", type=number(int, 2), help="test examples to measure or to fill in")
    add("--length", type=number(int, 2), default=256, help="text: characters of a chunk")
    add("--layers", type=count, default=12, help="text: the Transformer's layers")
    add("--width", type=count, default=768, help="text: the Transformer's channels")
    add("--heads", type=count, default=12, help="text: heads of its attention")
    argv, presets = sys.argv[1:] if argv is None else argv, PRESETS
    words = [word for word in argv if word not in ("-h", "--help")]
    dataset = parser.parse_known_args(words)[0].dataset
    if Path(dataset).is_file():  # read_args takes the folder's preset for what it does not know
        text = {key: value for key, value in PRESETS.items() if key.split()[0] == "text"}
        presets = PRESETS | {key.replace("text", "folder", 1): text[key] for key in text}
    fixed = ("transition", "T", "levels", "head", "length", "layers", "width", "heads")
    args = read_args(parser, presets, argv, fixed=fixed, variants=("transition", "method"))
    text = args.dataset == "text8" or Path(args.dataset).is_file()
    vars(args).setdefault("text", text)
    if args.loaded and text != args.text and args.dataset != args.loaded["args"]["dataset"]:
        fail(f"--dataset {args.dataset}: the checkpoint is of {'text' if args.text else 'images'}")
    if args.text and args.flip:
        fail("--flip mirrors images, not text")
    if args.method == "multinomial" and (args.transition != "uniform" or args.hybrid):
        fail("--method multinomial is the uniform transition with --hybrid 0")
    return args


def load_text(args, train):
    """-> (N,) uint8: the training or the test split of --dataset, text8 (downloaded once) or the
    path of a UTF-8 file. 0..25 are the letters, 26 is what lies between words."""
    if args.dataset == "text8":
        path = Path(args.data_dir, "text8.zip")
        if RANK > 0 and dist.is_initialized():
            dist.barrier()  # only the first process downloads
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part, _ = urllib.request.urlretrieve(TEXT8, f"{path}.part")
                os.replace(part, path)
            text = zipfile.ZipFile(path).read("text8")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"cannot read {path} or download it from {TEXT8} ({error}); without a "
                          "network put it there") from error
        if RANK == 0 and dist.is_initialized():
            dist.barrier()
    else:
        try:
            text = Path(args.dataset).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.dataset} is no UTF-8 text: {error}") from error
        text = re.sub("[^a-z]+", " ", text.lower()).encode()
    if len(text) < 40 * args.length:  # 2 chunks for testing
        raise ValueError(f"{args.dataset} has {len(text)} letters and spaces: --length "
                         f"{args.length} needs {40 * args.length}")
    letters = torch.from_numpy(np.frombuffer(text, np.uint8) - np.uint8(ord("a")))
    letters = letters.clamp(max=26)  # the space is far above
    return letters[: len(text) * 9 // 10] if train else letters[len(text) * 19 // 20 :]


def to_text(x):
    """States (L,) as characters."""
    return "".join(ALPHABET[state] for state in x.tolist())


class Transformer(nn.Module):
    """forward(x (B, length) int64 in 0..27, t (B,)) -> logits of x_0 (B, length, 27).

    The convolution shows each position its neighbours, which a small Transformer takes long to
    find. ValueError unless width is even, at least 4 and a multiple of heads.
    """

    def __init__(self, length, width, layers, heads, dropout):
        super().__init__()
        if width % heads or width % 2 or width < 4:
            raise ValueError(f"--width {width} is not even, a multiple of {heads} heads, 4 or more")
        self.token = nn.Embedding(len(ALPHABET), width)
        self.neighbours = nn.Conv1d(width, width, 9, padding=4)
        self.position = nn.Parameter(torch.randn(length, width))
        wide = nn.Linear(width, 4 * width)
        self.time_mlp = nn.Sequential(wide, nn.SiLU(), nn.Linear(4 * width, width))
        sizes, options = (width, heads, 4 * width, dropout), dict(batch_first=True, norm_first=True)
        self.layers = nn.Sequential(
            *[nn.TransformerEncoderLayer(*sizes, "gelu", **options) for _ in range(layers)]
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 27))
        nn.init.zeros_(self.out[1].weight)  # x_0 is uniform at first
        nn.init.zeros_(self.out[1].bias)

    def forward(self, x, t):
        temb = self.time_mlp(time_embedding(t, self.position.shape[1]))  # (B, width)
        h = self.token(x)  # (B, length, width)
        h = h + self.neighbours(h.transpose(1, 2)).transpose(1, 2)
        return self.out(self.layers(h + self.position + temb[:, None]))


def build_transformer(args, device):
    """As build_unet: with --checkpoint it has that file's EMA weights and is in eval mode."""
    torch.backends.mha.set_fastpath_enabled(False)  # whose GELU is another one on CUDA
    net = Transformer(args.length, args.width, args.layers, args.heads, args.dropout)
    if args.checkpoint:
        net.eval().requires_grad_(False).load_state_dict(args.loaded["ema"])
    if args.compile:
        net.compile()
    return net.to(device)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    steps, K, mask = args.num_steps or args.T, args.levels, None
    if args.task == "infill" and args.transition != "absorbing":
        raise ValueError("--task infill needs --transition absorbing, in training too")
    if steps > args.T:
        raise ValueError(f"--num-steps {steps} is more than --T {args.T}")
    if steps < args.T and args.transition == "gaussian":
        raise ValueError("--num-steps below --T needs --transition uniform or absorbing, in "
                         "training too")
    if args.text:
        mask = 27 if args.transition == "absorbing" else None
        K = 28 if mask else 27
    diffusion = CategoricalDiffusion(K, args.T, args.transition, mask=mask)
    device = setup(args)
    diffusion.to(device)

    def to_states(batch):
        states = batch.to(device).long()
        return states if args.text else states * K // 256

    def to_uint8(x):
        return (x * (255 / (K - 1))).round().to(torch.uint8)

    def test_states(n):
        if not args.text:
            return to_states(test_images(args, n)[0])
        chunks = load_text(args, train=False).unfold(0, args.length, args.length)
        chosen = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(args.seed))
        return to_states(chunks[chosen[:n]])

    data = None
    if args.text:
        shape, net = (args.length,), build_transformer(args, device)
        if not args.checkpoint:  # a chunk begins at every character; they share their memory
            data = (load_text(args, train=True).to(device).unfold(0, args.length, 1),)
    else:
        if not args.checkpoint:
            data = load_split(args, train=True)[:1]
        C = args.image_channels
        shape = (C, *args.image_size)
        net = build_unet(args, C, 2 * C if args.head == "logistic" else K * C, device)
    if data or args.task != "sample":
        test_states(1)  # what is wrong with them is said now, not after the training

    def model(x_t, t):
        if args.text:  # which has no mask in it
            return F.pad(call(net, args, x_t, t - 1), (0, K - 27), value=-math.inf)
        x = 2 * x_t.float() / (K - 1) - 1
        output = call(net, args, x, t - 1)
        if args.head == "logistic":
            mean, log_scale = output.chunk(2, dim=1)
            return discretized_logistic_logits((x + mean).tanh(), log_scale, K)
        return residual_logits(output.unflatten(1, (C, K)).movedim(2, -1), x_t)

    def loss_fn(batch):
        return d3pm_loss(model, to_states(batch), diffusion, args.hybrid)

    tau, stepped, process = [args.T * i // steps for i in range(steps + 1)], model, diffusion
    if steps < args.T:
        stepped, process = skip_steps(model, diffusion, tau[1:])

    def sample():
        record = []

        def draw(n):
            x_T = process.prior_sample((n, *shape))
            chain = None if record else record  # of the first batch
            return d3pm_sample(stepped, x_T, process, args.final_mode, record=chain)

        if args.text:
            texts = []
            while len(texts) < args.num_samples:
                n = min(args.sample_batch_size, args.num_samples - len(texts))
                texts += map(to_text, draw(n))
                report(f"{len(texts)} of {args.num_samples} texts", last=True)
            Path(args.out, "samples.txt").write_text("\n\n".join(texts) + "\n")
        else:
            images = save_images(lambda n: to_uint8(draw(n)), args)
            save_grid(images, Path(args.out, "samples.png"), columns=8)
        times, rows = [0, *record_steps(steps)], []
        try:
            x_0 = test_states(1).expand(len(times), *shape)
            rows.append((times, process.q_sample(x_0, torch.tensor(times, device=device))))
        except (ValueError, OSError) as error:
            report(f"the process goes without its forward part: {error}", last=True)
        chains = torch.stack(record, dim=1)  # (n, 16, ...): at the recorded steps, and x_0
        rows += [(times[::-1], chain) for chain in chains[: 1 if args.text else 4]]
        if args.text:
            parts = [
                [f"{tau[t]:5d}  {to_text(x)}\n" for t, x in zip(*row, strict=True)] for row in rows
            ]
            Path(args.out, "process.txt").write_text("\n".join("".join(part) for part in parts))
        else:
            states = torch.cat([states for _, states in rows])
            save_grid(to_uint8(states), Path(args.out, "process.png"), columns=len(times))
        return {"n": args.num_samples, "final_mode": args.final_mode, "evaluations": steps}

    def bpd():
        args.bf16 = False
        batches = test_states(args.num_test).split(args.sample_batch_size)
        parts = [bits_per_dim(stepped, x_0, process) for x_0 in batches]
        bits = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
        bits["L_t"] = bits["L_t"].sum(1)
        mean = {key: bits[key].mean().item() for key in ("total", "L_T", "L_t", "L_0")}
        n = len(bits["total"])
        mean["standard_error"] = bits["total"].std().item() / math.sqrt(n)
        unit = "bits/char" if args.text else "bits/dim"
        report(f"test {unit} <= " + "{total:.4f} +- {standard_error:.4f}, of which L_T {L_T:.6f}, "
               "L_1 to L_T-1 {L_t:.4f}, L_0 {L_0:.4f}; n = ".format(**mean) + str(n), last=True)
        return {"n": n, "split": "test", "evaluations": steps, unit.replace("/", "_per_"): mean}

    def filling():
        x, completions = test_states(args.num_test), 3
        places = shape[-1:] if args.text else shape[-2:]
        first = torch.arange(math.prod(places), device=device) < math.prod(places) // 2
        rows = []
        for known in (first, torch.rand(len(first), device=device) < 0.5):  # half, every second
            known = known.view(places)
            parts = x.repeat_interleave(completions, 0).split(args.sample_batch_size)
            filled = torch.cat([infill(stepped, part, known, process) for part in parts])
            given = torch.where(known, x, mask or K // 2)
            for i, chosen in enumerate(filled.split(completions)):
                rows.append(torch.cat([given[i : i + 1], chosen, x[i : i + 1]]))
        if args.text:
            texts = ["\n".join(map(to_text, row)) for row in rows]
            Path(args.out, "infill.txt").write_text("\n\n".join(texts) + "\n")
        else:
            save_grid(to_uint8(torch.cat(rows)), Path(args.out, "infill.png"), completions + 2)
        return {"n": len(x), "split": "test", "completions": completions}

    tasks = {"sample": sample, "bpd": bpd, "infill": filling}
    run(args, tasks, net, loss_fn, data, also=("bpd",), method=args.method, hybrid=args.hybrid,
        transition=args.transition, T=args.T, K=K)


if __name__ == "__main__":
    main()
