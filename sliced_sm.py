"""Sliced score matching, SSM (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088), and the networks with
noise levels that NCSN (Song, Ermon 2019, arXiv:1907.05600) trains with it.

Implements: SSM's Sec. 2 and 3 with Alg. 1; and, with NCSN's numbers, its Eq. (4), (6);
Alg. 1; Fig. 2.

    x               data; images: 8 bits scaled linearly to [0, 1]  (B, ...), d numbers each
    s, score(x)     the model of grad log p(x), the score           like x
    v               random projection, E[v v^T] = I                 like x
    z               noise of the data, of each Langevin step        like x, N(0, I)
    sigmas          noise levels sigma_1 > ... > sigma_L            (L,) float64, with one ratio
    score(x, sigma) the score of the data with noise, sigma (B,)    like x

    python sliced_sm.py                                             train on digits, sample
    python sliced_sm.py --dataset gmm --objective ssm               Fig. 2; or sm, ssm-vr, dsm
    python sliced_sm.py --dataset checkerboard
    python sliced_sm.py --levels 1 --data-noise 0.01                Fig. 1, and without the noise
    python sliced_sm.py --checkpoint runs/sliced_sm-digits/checkpoint.pt --task cost

README.md has measured results. Deviations from NCSN's training by sliced score matching:
1. The network, DDPM's U-Net, takes 2 x - 1 and the level's index; score = its output / sigma.
2. The loss is divided by d: with gradient clipping the scale matters.
3. The EMA decay after n steps is min(decay, (1 + n) / (10 + n)), to forget the initial weights.
4. Rademacher projections, SSM's default; NCSN's code draws Gaussian ones.
5. Images are not dequantised.
6. On digits sigma falls from 3 to 0.1, not 1 to 0.01, and chains end with the sequel's denoising.
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

# The fused attention has no second derivative, which two losses need: they take the plain one.
twice_differentiable = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@twice_differentiable
def exact_score_matching(score, x):
    """Score matching (Hyvarinen 2005): tr(grad s) + 1/2 |s|^2, (B,), for x (B, ...).
    One back-propagation for each of the d dimensions. Here and below each row of s depends on its
    own row of x only, so the sum over the batch can be differentiated at once."""
    x = x.detach().requires_grad_()
    s = score(x)
    trace = 0
    for i, s_i in enumerate(s.flatten(1).unbind(1)):  # each (B,)
        (grad,) = torch.autograd.grad(s_i.sum(), x, create_graph=True)  # d s_i / d x
        trace = trace + grad.flatten(1)[:, i]
    return trace + 0.5 * s.square().flatten(1).sum(1)  # SSM, Sec. 2


def denoising_score_matching(score, x, sigma):
    """1/2 |s(x_tilde) + z / sigma|^2 at x_tilde = x + sigma z, (B,), for x (B, ...): it matches the
    score of the data with noise. sigma: a number, or a tensor that broadcasts against x."""
    z = torch.randn_like(x)
    return 0.5 * (score(x + sigma * z) + z / sigma).square().flatten(1).sum(1)  # SSM, Sec. 2


def random_projection(x, kind):
    """v like x (B, ...) with E[v v^T] = I, of kind "rademacher", "gaussian" or "sphere".
    The sphere's radius is sqrt(d); "rademacher", random signs, is exact for a diagonal Jacobian."""
    if kind == "rademacher":
        return 2 * torch.randint_like(x, 2) - 1
    v = torch.randn_like(x)
    if kind == "gaussian":
        return v
    if kind == "sphere":
        length = v.flatten(1).norm(dim=1)  # (B,)
        return v * expand(math.sqrt(x[0].numel()) / length, x)
    raise ValueError(f"projection is {kind!r}, not 'rademacher', 'gaussian' or 'sphere'")


@twice_differentiable
def sliced_score_matching(score, x, n_projections=1, projection="rademacher",
                          variance_reduced=True):
    """v^T grad(v^T s) + 1/2 (v^T s)^2, the mean of n_projections draws of v: (B,), for x (B, ...).
    One back-propagation for each projection, whatever d. variance_reduced: 1/2 |s|^2, which is the
    expectation of 1/2 (v^T s)^2, in its place (SSM-VR). ValueError: n_projections < 1."""
    if n_projections < 1:
        raise ValueError(f"n_projections is {n_projections}, not at least 1")
    x = x.detach().requires_grad_()
    s = score(x)
    loss = 0
    for _ in range(n_projections):
        v = random_projection(x, projection)
        slices = (v * s).flatten(1).sum(1)  # v^T s, (B,)
        (grad,) = torch.autograd.grad(slices.sum(), x, create_graph=True)  # d (v^T s) / d x
        square = s.square().flatten(1).sum(1) if variance_reduced else slices.square()
        loss = loss + (v * grad).flatten(1).sum(1) + 0.5 * square  # SSM, Sec. 3 and Alg. 1
    return loss / n_projections


def noisy_score_matching(score, x, sigma, objective="ssm-vr", n_projections=1,
                         projection="rademacher"):
    """An objective, (B,), for the score of x (B, ...) with noise sigma z; of x itself at sigma 0.
    objective "sm": exact; "ssm", "ssm-vr": sliced, without and with reduced variance; "dsm":
    denoising. sigma: like denoising_score_matching's. ValueError: another objective, or "dsm" at
    sigma 0."""
    if objective == "dsm":
        if isinstance(sigma, (int, float)) and sigma <= 0:
            raise ValueError(f"sigma is {sigma}: 'dsm' needs noise")
        return denoising_score_matching(score, x, sigma)
    x_tilde = x + sigma * torch.randn_like(x)  # where the score is differentiated
    if objective == "sm":
        return exact_score_matching(score, x_tilde)
    if objective not in ("ssm", "ssm-vr"):
        raise ValueError(f"objective is {objective!r}, not 'sm', 'ssm', 'ssm-vr' or 'dsm'")
    return sliced_score_matching(score, x_tilde, n_projections, projection, objective == "ssm-vr")


def noise_conditional_loss(score, x, sigmas, objective="ssm-vr", n_projections=1,
                           projection="rademacher"):
    """noisy_score_matching at a random level for each image, weighted by lambda = sigma^2: scalar,
    the mean over the batch. x (B, ...), score(x, sigma), sigmas (L,)."""
    sigma = sigmas[torch.randint(len(sigmas), (len(x),), device=x.device)].to(x.dtype)  # (B,)
    loss = noisy_score_matching(lambda x: score(x, sigma), x, expand(sigma, x), objective,
                                n_projections, projection)
    return (sigma.square() * loss).mean()  # NCSN Eq. (6)


def level_score_model(net, sigmas):
    """score(x, sigma) from a network of images in [-1, 1] and the level's index: output / sigma."""

    def score(x, sigma):
        index = (sigmas.to(sigma.dtype) - sigma[:, None]).abs().argmin(1)
        return net(2 * x - 1, index) / expand(sigma, x)

    return score


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def langevin(score, x, eps, T, record=None):
    """T steps of Langevin dynamics, each of size eps, from x (B, ...); here score(x) is like x.
    record: a list to which at most 15 states are appended, evenly spaced, the last among them."""
    recorded = record_steps(T)
    for t in range(1, T + 1):
        x = x + eps / 2 * score(x) + eps**0.5 * torch.randn_like(x)  # Eq. (4)
        if record is not None and t in recorded:
            record.append(x)
    return x


def record_steps(T):
    """At most 15 evenly spaced steps of 1..T, ascending: a sampler records its states there."""
    return sorted({math.ceil(T * k / 15) for k in range(1, 16)})


def geometric_sigmas(sigma_1, sigma_L, L):
    """Levels sigma_1 > ... > sigma_L, geometric, (L,) float64 (Sec. 4.1). L = 1: (sigma_L,).
    ValueError unless L >= 1 and sigma_1 > sigma_L > 0 (or L = 1)."""
    if L < 1 or sigma_L <= 0 or (L > 1 and sigma_1 <= sigma_L):
        raise ValueError(f"sigma from {sigma_1} to {sigma_L} in {L} levels: need L >= 1, falling")
    if L == 1:
        return torch.tensor([sigma_L], dtype=torch.float64)
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), L, dtype=torch.float64)


@torch.no_grad()
def annealed_langevin(score, x, sigmas, eps, T, denoise=False, record=None):
    """Alg. 1 from x (B, ...), in the papers U[0, 1]: L T evaluations of score(x, sigma).
    eps: the step size at sigma_L. denoise: one more evaluation, for the mean of the data given x
    (NCSNv2, Alg. 1). record: like langevin's, then the denoised state."""
    recorded, step = record_steps(len(sigmas) * T), 0
    for sigma in sigmas:  # Alg. 1, line 2
        alpha = eps * sigma**2 / sigmas[-1] ** 2  # Alg. 1, line 3
        level = sigma.to(x.dtype).expand(len(x))  # (B,)
        for _ in range(T):
            z = torch.randn_like(x)
            x = x + alpha / 2 * score(x, level) + alpha.sqrt() * z  # Alg. 1, line 6
            step += 1
            if record is not None and step in recorded:
                record.append(x)
    if denoise:
        x = x + sigma**2 * score(x, level)  # x_tilde + sigma_L^2 score, NCSNv2
        if record is not None:
            record.append(x)
    return x


# The toy data: 1/5 N((-5, -5), I) + 4/5 N((5, 5), I) (NCSN, Fig. 2), and a checkerboard


def gmm_sample(n):
    """n draws (n, 2) of the mixture."""
    sign = (torch.rand(n, 1) < 0.8).float() * 2 - 1
    return 5 * sign + torch.randn(n, 2)


def gmm_score(x, sigma):
    """Exact score (B, 2) at x (B, 2) of the mixture with noise of deviation sigma (B,) added."""
    variance = 1 + expand(sigma, x).square()  # (B, 1)
    # sigmoid(log_ratio) is the posterior probability of the mode at (5, 5)
    log_ratio = math.log(4) + 10 * x.sum(1, keepdim=True) / variance
    return (5 * (2 * log_ratio.sigmoid() - 1) - x) / variance


def checkerboard_sample(n):
    """n draws (n, 2), uniform on the 8 dark squares, of side 2, of a board on [-4, 4]^2."""
    row, half = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([2 * half + row % 2, row], dim=1)  # column and row of the square
    return 2 * (corner + torch.rand(n, 2)) - 4


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # NCSN's CIFAR-10, with sources; every key is a flag
    lr=1e-3, batch_size=128, ema_decay=0.0, steps=200_000, flip=True, image_size=(32, 32),  # Sec. 5
    channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,),
    dropout=0.0, warmup=0, lr_decay=0.0, grad_clip=0.0,  # the U-Net is DDPM's
    num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
    objective=(("ssm-vr", "ssm", "sm", "dsm"), "sliced (vr: less variance), exact, denoising"),
    projection=(("rademacher", "gaussian", "sphere"), "distribution of the projections"),
    num_projections=(1, "projections of each image (released code)"),
    sigma_max=(1.0, "sigma_1 (Sec. 5)"), sigma_min=(0.01, "sigma_L (Sec. 5)"),
    levels=(10, "L (Sec. 5); 1: not noise-conditional, and plain Langevin dynamics"),
    data_noise=(0.0, "noise of the data, with one level (Fig. 1)"),
    T=(100, "Langevin steps at each level (Alg. 1)"), eps=(2e-5, "step size of Alg. 1 (Sec. 5)"),
    denoise=(False, "end with the mean of the data given the last sample"),
    num_test=(500, "test images of task test"),
)
MNIST = dict(
    image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
    flip=False,
)
GMM = dict(  # NCSN, Fig. 2, 3 and their appendix; ours: the EMA, as Adam's last weights are noisy
    levels=1, sigma_min=1.0, T=1000, eps=0.1, steps=10_000, num_samples=1280, flip=False,
    ema_decay=0.999,
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": dict(flip=False), "mnist": MNIST, "fashion_mnist": MNIST, "gmm": GMM,
    "checkerboard": GMM | dict(data_noise=0.2, eps=0.01),  # ours: its sharp edges have no score
    "digits": dict(  # not in the papers: trains in minutes on a laptop
        sigma_max=3.0, sigma_min=0.1, levels=32, T=20, eps=0.002, denoise=True, ema_decay=0.999,
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(8,), lr=4e-3, batch_size=64, steps=1000, warmup=150, lr_decay=1.0,
        grad_clip=1.0, flip=False, log_every=50, save_every=250,
    ),
}
TOYS = {"gmm": gmm_sample, "checkerboard": checkerboard_sample}


def preset(args):
    changes = PRESETS.get(args.dataset, PRESETS["folder"])
    if args.levels == 1 and args.dataset not in TOYS:  # NCSN, Fig. 1
        changes = changes | dict(sigma_min=0.01, T=1000, eps=2e-5, denoise=False)
        changes |= dict(steps=50_000) if args.dataset != "digits" else {}
    if args.dataset == "gmm" and args.objective == "dsm":
        changes = changes | dict(data_noise=0.3)  # ours: it needs noise
    return changes


def check(run):
    """ValueError for what does not go together."""
    toy, loaded = run.dataset in TOYS, run.loaded
    if loaded and (loaded["settings"]["dataset"] in TOYS) != toy:
        raise ValueError(f"--dataset {run.dataset}: points and images have different networks")
    if toy and (run.flip or run.task != "sample" or run.levels > 1):
        raise ValueError(f"--dataset {run.dataset} takes --task sample, --levels 1 and --no-flip")
    if run.levels > 1 and run.data_noise > 0:
        raise ValueError("--data-noise takes --levels 1: the levels are noise of the data already")
    if run.levels == 1 and run.task == "test":
        raise ValueError("--task test is for noise levels, and --levels 1 has none")
    if run.levels == 1 and run.objective == "dsm" and not run.data_noise:
        raise ValueError("--objective dsm needs noise: with --levels 1 add --data-noise 0.01")
    if run.compile and (run.task == "cost" or not run.checkpoint and run.objective != "dsm"):
        raise ValueError("--compile cannot differentiate twice, as all objectives but dsm do")


def to_float(images):
    return images.float() / 255


def to_uint8(x):
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def loss(run, batch):
    """The objective per dimension, weighted by sigma^2."""
    x = batch if run.dataset in TOYS else to_float(batch)
    options = (run.objective, run.num_projections, run.projection)
    if run.levels > 1:
        total = noise_conditional_loss(run.score, x, run.sigmas, *options)
    else:
        total = noisy_score_matching(run.one_level, x, run.data_noise, *options).mean()
        total = run.sigma_min**2 * total  # NCSN Eq. (6)'s weight
    return total / x[0].numel()


def sample(run):
    """Samples; process.png: a test image with the noise of each column, then eight chains."""
    chain = dict(sigmas=run.sigmas, eps=run.eps, T=run.T, denoise=run.denoise)

    def draw(first, n, record):
        x = torch.rand(n, run.image_channels, *run.image_size, device=run.device)  # U[0, 1]
        if record is not None:
            record.append(x)
        return to_uint8(annealed_langevin(run.score, x, **chain, record=record))

    images, record = save_images(draw, run)
    save_grid(images, run.out / "samples.png", columns=10)
    if record:
        rows = [*torch.stack(record, dim=1)[:8]]
        if run.test is not None:
            steps = [1, *record_steps(run.levels * run.T)]
            sigma = torch.stack([run.sigmas[(step - 1) // run.T] for step in steps])
            sigma = torch.cat([sigma, sigma.new_zeros(int(run.denoise))])  # none after denoising
            x = to_float(run.test[:1]).expand(len(record), -1, -1, -1)
            rows.insert(0, x + expand(sigma, x) * torch.randn_like(x))
        save_grid(to_uint8(torch.cat(rows)), run.out / "process.png", columns=len(record))
    return {"n": run.num_samples, "evaluations": run.levels * run.T + run.denoise, **run.measured}


def test(run):
    """The yardstick: denoising score matching, whatever objective trained the network."""
    run.bf16, images, losses = False, to_float(run.test[: run.num_test]), []
    for sigma in run.sigmas:
        parts = [noise_conditional_loss(run.score, x, sigma[None], "dsm") * len(x)
                 for x in images.split(run.sample_batch_size)]
        losses.append(sum(parts).item() / images.numel())
    print(f"denoising loss per dimension of {len(images)} test images: "
          f"{sum(losses) / len(losses):.4f}, from {losses[0]:.4f} at sigma_1 to "
          f"{losses[-1]:.4f} at sigma_L; a score of 0 has 0.5")
    return {"n": len(images), "split": "test", "dsm_loss": losses, **run.measured}


def fluctuation(run):
    """Fig. 1: how much the loss varies in the second half of the training."""
    lines = (run.out / "log.jsonl").read_text().splitlines()
    losses = torch.tensor([json.loads(line)["loss"] for line in lines[len(lines) // 2 :]])
    mean, std = losses.mean().item(), losses.std(correction=0).item()
    print(f"the training's second half: {len(losses)} lines of the log with losses of "
          f"{mean:.4f} +- {std:.4f}")
    return {"n": len(losses), "loss_mean": mean, "loss_std": std, **run.measured}


def seconds(net, score, x, objective):
    """Seconds for one gradient of net's weights on x: the best of three, after one to warm up."""
    times = []
    for _ in range(4):
        since = time.time()
        noisy_score_matching(score, x, 0.1, objective).mean().backward()
        sum(p.grad.sum() for p in net.parameters()).item()  # waits for a GPU
        net.zero_grad()
        times.append(time.time() - since)
    return min(times[1:])


def cost(run):
    """A training step's cost for each objective, of the U-Net and of an MLP in d dimensions."""
    size = (run.batch_size, run.image_channels, *run.image_size)
    x, table = torch.rand(size, device=run.device), []
    run.net.requires_grad_(True)
    unet = {name: seconds(run.net, run.one_level, x, name) for name in ("dsm", "ssm", "ssm-vr")}
    print(f"U-Net, {len(x)} images: a step takes {unet['dsm']:.3f} s with dsm, "
          f"{unet['ssm-vr'] / unet['dsm']:.2f} times as long with ssm-vr")
    for d in (4, 16, 64):
        small, x = mlp(d, 128).to(run.device), torch.randn(128, d, device=run.device)
        row = {name: seconds(small, small, x, name) for name in ("dsm", "ssm", "ssm-vr", "sm")}
        table.append({"d": d, **row})
        times = ", ".join(f"{1000 * row[name]:.1f} by {name}" for name in row)
        print(f"MLP, 128 points of {d} dimensions, milliseconds: {times}")
    return {"batch_size": run.batch_size, "unet_seconds": unet, "mlp_seconds": table}


def mlp(d, width):
    """The toys' score network (NCSN's appendix): d -> width -> width -> d, with softplus."""
    middle = (nn.Softplus(), nn.Linear(width, width), nn.Softplus())
    return nn.Sequential(nn.Linear(d, width), *middle, nn.Linear(width, d))


def histogram(x, title):
    """Points (N, 2) in the square [-10, 10]^2, y upwards, as an image (1, 324, 324)."""
    counts = torch.histogramdd(x.cpu().flip(1), 81, range=[-10, 10] * 2).hist.flip(0)
    shade = 255 * (1 - (counts / counts.max().clamp(min=1)).sqrt())
    picture = to_pil_image(shade.to(torch.uint8)).resize((324, 324), Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def arrows(x, scores, title):
    """scores, each (N, 2), as lines from the points x (N, 2) in histogram's square: the last one
    thin and black, one before it thick and grey. |s| = 1 is a line of length 1/2, infinity of 1."""
    picture = Image.new("L", (324, 324), 255)
    draw, styles = ImageDraw.Draw(picture), ((190, 5), (0, 1))
    for s, (shade, width) in zip(scores, styles[-len(scores):], strict=True):
        lines = torch.cat([x, x + s / (1 + s.norm(dim=1, keepdim=True))], dim=1)  # x, y, x, y
        for line in (162 * (1 + lines / 10 * lines.new_tensor([1, -1, 1, -1]))).tolist():
            draw.line(line, shade, width)
            draw.circle(line[:2], (width + 1) / 2, shade)
    draw.text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def square(run, n):
    """n^2 points of [-8, 8]^2, where the chains start."""
    line = torch.linspace(-8, 8, n, device=run.device)
    return torch.cartesian_prod(line, line)


def score_error(run):
    """On gmm, inside the discs of radius 3 around the modes (99% of the data) and outside."""
    x, measured = square(run, 161), {}
    near = torch.minimum((x - 5).norm(dim=1), (x + 5).norm(dim=1)) <= 3
    for name, where in (("inside", near), ("outside", ~near)):
        exact = gmm_score(x[where], x.new_full((1,), run.data_noise))
        error = (run.net(x[where]) - exact).square().sum(1).mean().item()
        share = error / exact.square().sum(1).mean().item()
        measured[name] = {"mean_squared_error": error, "of_mean_square": share}
        print(f"score {name} the high-density region: mean squared error {error:.4f}, "
              f"{share:.1%} of the score's mean square")
    return measured


def toy_sample(run):
    """Fig. 2: the data, the learned score and the exact one, Langevin samples."""
    noise = run.data_noise * torch.randn(run.num_samples, 2)
    x, points = TOYS[run.dataset](run.num_samples) + noise, square(run, 17)
    scores, title, measured = [run.net(points).cpu()], "learned score", {}
    if run.dataset == "gmm":
        exact = gmm_score(points, points.new_full((1,), run.data_noise))
        scores, title = [exact.cpu(), *scores], "learned score; grey: exact"
        measured = score_error(run)
    start = 16 * torch.rand(run.num_samples, 2, device=run.device) - 8  # U[-8, 8]^2
    chains = langevin(run.net, start, run.eps, run.T)
    pictures = [histogram(x, "data"), arrows(points.cpu(), scores, title),
                histogram(chains, "Langevin dynamics")]
    save_grid(torch.stack(pictures), run.out / f"{run.dataset}.png", columns=3)
    return {"n": len(chains), "evaluations": run.T, **measured, **run.measured}


TASKS = {"sample": sample, "test": test, "cost": cost}


def main(argv=None):
    with one_line_errors():
        run = read_args(argv, SETTINGS, preset, TASKS, ("sigma_max", "sigma_min", "levels"))
        check(run)
        sigmas = geometric_sigmas(run.sigma_max, run.sigma_min, run.levels)
        setup(run)
        dtype = torch.float32 if run.device.type == "mps" else torch.float64  # mps has no float64
        run.sigmas = sigmas.to(run.device, dtype)
        keys = ("objective", "levels", "projection", "num_projections", "data_noise", "eps")
        run.measured = {key: getattr(run, key) for key in keys}
        if run.dataset in TOYS:
            tasks, also = {"sample": toy_sample}, ()
            data = None if run.checkpoint else [TOYS[run.dataset](100_000).to(run.device)]
            run.one_level = prepare(run, mlp(2, run.channels))
        else:
            tasks, also = TASKS | {"loss": fluctuation}, ("test",) if run.levels > 1 else ("loss",)
            data = load_data(run)
            net = prepare(run, UNet(run.image_channels, run.image_channels, **run.unet))
            run.score = level_score_model(net, run.sigmas)
            run.one_level = lambda x: run.score(x, run.sigmas[0].to(x.dtype).expand(len(x)))
        if data:
            fit(run.net, lambda batch: loss(run, batch), data[:1], run)
        do_tasks(run, tasks, also)


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
