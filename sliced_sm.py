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
def langevin(score, x, eps, T, callback=None):
    """T steps of Langevin dynamics, each of size eps, from x (B, ...); here score(x) is like x.
    callback(n, x) is called with every state, n the steps that are left: T ... 0."""
    callback = (lambda n, x: None) if callback is None else callback
    for n in range(T, 0, -1):
        callback(n, x)
        x = x + eps / 2 * score(x) + eps**0.5 * torch.randn_like(x)  # Eq. (4)
    callback(0, x)
    return x


def geometric_sigmas(sigma_1, sigma_L, L):
    """Levels sigma_1 > ... > sigma_L, geometric, (L,) float64 (Sec. 4.1). L = 1: (sigma_L,).
    ValueError unless L >= 1 and sigma_1 > sigma_L > 0 (or L = 1)."""
    if L < 1 or sigma_L <= 0 or (L > 1 and sigma_1 <= sigma_L):
        raise ValueError(f"sigma from {sigma_1} to {sigma_L} in {L} levels: need L >= 1, falling")
    if L == 1:
        return torch.tensor([sigma_L], dtype=torch.float64)
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), L, dtype=torch.float64)


@torch.no_grad()
def annealed_langevin(score, x, sigmas, eps, T, denoise=False, callback=None):
    """Alg. 1 from x (B, ...), in the papers U[0, 1]: L T evaluations of score(x, sigma).
    eps: the step size at sigma_L. denoise: one more evaluation, for the mean of the data given x
    (NCSNv2, Alg. 1). callback: like langevin's, n from L T to 0, which is the denoised state."""
    callback = (lambda n, x: None) if callback is None else callback
    n = len(sigmas) * T  # steps that are left
    for sigma in sigmas:  # Alg. 1, line 2
        alpha = eps * sigma**2 / sigmas[-1] ** 2  # Alg. 1, line 3
        level = sigma.to(x.dtype).expand(len(x))  # (B,)
        for _ in range(T):
            callback(n, x)
            z = torch.randn_like(x)
            x = x + alpha / 2 * score(x, level) + alpha.sqrt() * z  # Alg. 1, line 6
            n -= 1
    if denoise:
        x = x + sigma**2 * score(x, level)  # x_tilde + sigma_L^2 score, NCSNv2
    callback(0, x)
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

METHOD = "sliced_sm"  # in checkpoints
FIXED = ("sigma_max", "sigma_min", "levels")  # a checkpoint decides these
READS = {}  # other methods' checkpoints, and settings that these lack
SETTINGS = dict(  # NCSN's CIFAR-10, with sources; every key is a flag
    lr=1e-3, batch_size=128, ema_decay=0.0, steps=200_000, flip=True, image_size=[32, 32],  # Sec. 5
    channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2, attention_resolutions=[16],
    dropout=0.0, warmup=0, grad_clip=0.0,  # the U-Net is DDPM's
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
    image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], attention_resolutions=[14],
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
        image_size=[16, 16], channels=16, channel_mult=[1, 2, 4], num_res_blocks=1,
        attention_resolutions=[8], lr=4e-3, batch_size=64, steps=1000, warmup=150, lr_decay=1.0,
        grad_clip=1.0, flip=False, log_every=50, save_every=250, preview=8,
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


def check(args, loaded):
    """ValueError for what does not go together."""
    toy = args.dataset in TOYS
    if loaded and (loaded["settings"]["dataset"] in TOYS) != toy:
        raise ValueError(f"--dataset {args.dataset}: points and images have different networks")
    if toy and (args.flip or args.task != "sample" or args.levels > 1):
        raise ValueError(f"--dataset {args.dataset} takes --task sample, --levels 1 and --no-flip")
    if args.levels > 1 and args.data_noise > 0:
        raise ValueError("--data-noise takes --levels 1: the levels are noise of the data already")
    if args.levels == 1 and args.task == "test":
        raise ValueError("--task test is for noise levels, and --levels 1 has none")


def to_float(images):
    return images.float() / 255


def to_uint8(x):
    if not x.isfinite().all():
        raise ValueError("a sample is not finite: --eps is too large for these levels")
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def one_level(score, sigmas):
    """score(x) of a noise-conditional one at its first level."""
    return lambda x: score(x, sigmas[0].to(x.dtype).expand(len(x)))


def loss(args, net, sigmas, batch):
    """The objective per dimension, weighted by sigma^2."""
    toy, options = args.dataset in TOYS, (args.objective, args.num_projections, args.projection)
    x, score = (batch, net) if toy else (to_float(batch), level_score_model(net, sigmas))
    if args.levels > 1:
        total = noise_conditional_loss(score, x, sigmas, *options)
    else:
        score = score if toy else one_level(score, sigmas)
        total = noisy_score_matching(score, x, args.data_noise, *options).mean()
        total = args.sigma_min**2 * total  # NCSN Eq. (6)'s weight
    return total / x[0].numel()


def draw(args, device, net, sigmas, n, callback=None):
    x = torch.rand(n, args.image_channels, *args.image_size, device=device)  # U[0, 1]
    score = level_score_model(net, sigmas)
    return annealed_langevin(score, x, sigmas, args.eps, args.T, args.denoise, callback)


def sample(args, device, net, sigmas):
    net, states = fast(net, args, device), {}
    for first, n in batches(args):
        x = draw(args, device, net, sigmas, n, partial(keep, states))
        save_images(to_uint8(x), first, args)
    save_pictures(args, states, to_uint8)
    return {"n": args.num_samples, "evaluations": args.levels * args.T + args.denoise}


def test(args, device, net, sigmas):
    """The yardstick: denoising score matching, whatever objective trained the network."""
    images, losses = to_float(load_images(args, device, args.num_test)[0]), []
    score = level_score_model(net, sigmas)
    for sigma in sigmas:
        parts = [noise_conditional_loss(score, x, sigma[None], "dsm") * len(x)
                 for x in images.split(args.sample_batch_size)]
        losses.append(sum(parts).item() / images.numel())
    print(f"denoising loss per dimension of {len(images)} test images: "
          f"{sum(losses) / len(losses):.4f}, from {losses[0]:.4f} at sigma_1 to "
          f"{losses[-1]:.4f} at sigma_L; a score of 0 has 0.5")
    return {"n": len(images), "split": "test", "dsm_loss": losses}


def fluctuation(args, *_):
    """Fig. 1: how much the loss varies in the second half of the training."""
    log = Path(args.out, "log.jsonl").read_text()
    losses = [float(number) for number in re.findall(r'"loss": (\S+),', log)]
    losses = torch.tensor(losses[len(losses) // 2 :])
    mean, std = losses.mean().item(), losses.std(correction=0).item()
    print(f"the training's second half: {len(losses)} lines of the log with losses of "
          f"{mean:.4f} +- {std:.4f}")
    return {"n": len(losses), "loss_mean": mean, "loss_std": std}


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


def cost(args, device, net, sigmas):
    """A training step's cost for each objective, of the U-Net and of an MLP in d dimensions."""
    size = (args.batch_size, args.image_channels, *args.image_size)
    x, table = torch.rand(size, device=device), []
    net.requires_grad_(True)
    score = one_level(level_score_model(net, sigmas), sigmas)
    unet = {name: seconds(net, score, x, name) for name in ("dsm", "ssm", "ssm-vr")}
    print(f"U-Net, {len(x)} images: a step takes {unet['dsm']:.3f} s with dsm, "
          f"{unet['ssm-vr'] / unet['dsm']:.2f} times as long with ssm-vr")
    for d in (4, 16, 64):
        small, x = mlp(d, 128).to(device), torch.randn(128, d, device=device)
        row = {name: seconds(small, small, x, name) for name in ("dsm", "ssm", "ssm-vr", "sm")}
        table.append({"d": d, **row})
        times = ", ".join(f"{1000 * row[name]:.1f} by {name}" for name in row)
        print(f"MLP, 128 points of {d} dimensions, milliseconds: {times}")
    return {"batch_size": args.batch_size, "unet_seconds": unet, "mlp_seconds": table}


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


def square(n, device):
    """n^2 points of [-8, 8]^2, where the chains start."""
    line = torch.linspace(-8, 8, n, device=device)
    return torch.cartesian_prod(line, line)


def score_error(args, device, score):
    """On gmm, inside the discs of radius 3 around the modes (99% of the data) and outside."""
    x, results = square(161, device), {}
    near = torch.minimum((x - 5).norm(dim=1), (x + 5).norm(dim=1)) <= 3
    for name, where in (("inside", near), ("outside", ~near)):
        exact = gmm_score(x[where], x.new_full((1,), args.data_noise))
        error = (score(x[where]) - exact).square().sum(1).mean().item()
        share = error / exact.square().sum(1).mean().item()
        results[name] = {"mean_squared_error": error, "of_mean_square": share}
        print(f"score {name} the high-density region: mean squared error {error:.4f}, "
              f"{share:.1%} of the score's mean square")
    return results


def toy_sample(args, device, score):
    """Fig. 2: the data, the learned score and the exact one, Langevin samples."""
    noise = args.data_noise * torch.randn(args.num_samples, 2)
    x, points = TOYS[args.dataset](args.num_samples) + noise, square(17, device)
    scores, title, results = [score(points).cpu()], "learned score", {}
    if args.dataset == "gmm":
        exact = gmm_score(points, points.new_full((1,), args.data_noise))
        scores, title = [exact.cpu(), *scores], "learned score; grey: exact"
        results = score_error(args, device, score)
    start = 16 * torch.rand(args.num_samples, 2, device=device) - 8  # U[-8, 8]^2
    chains = langevin(score, start, args.eps, args.T)
    if not chains.isfinite().all():
        raise ValueError(f"the chains diverge: --eps {args.eps} is too large for this score")
    pictures = [histogram(x, "data"), arrows(points.cpu(), scores, title),
                histogram(chains, "Langevin dynamics")]
    save_grid(torch.stack(pictures), Path(args.out, f"{args.dataset}.png"), columns=3)
    return {"n": len(chains), "evaluations": args.T, **results}


TASKS = {"sample": sample, "test": test, "cost": cost}


def main(argv=None):
    args, loaded, trains = read_args(argv)
    check(args, loaded)
    sigmas = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    device, is_toy = setup(args), args.dataset in TOYS
    # mps has no float64
    sigmas = sigmas.to(device, torch.float32 if device.type == "mps" else torch.float64)
    if trains:
        data = TOYS[args.dataset](100_000).to(device) if is_toy else load_images(args, device)[0]
    if trains and not is_toy:
        args.image_channels = data.shape[1]
    C = args.image_channels
    options = {key: getattr(args, key) for key in UNET}
    net = (mlp(2, args.channels) if is_toy else UNet(C, C, **options)).to(device)
    if trains:
        fit(net, lambda model, x: loss(args, model, sigmas, x), [data], args, device, loaded,
            None if is_toy else lambda ema: to_uint8(draw(args, device, ema, sigmas, args.preview)))
    else:
        net.load_state_dict(loaded["ema"])
    net.eval().requires_grad_(False)
    if is_toy:
        do_tasks(args, loaded, trains, {"sample": toy_sample}, (), device, net)
    else:
        tasks, also = TASKS | {"loss": fluctuation}, "test" if args.levels > 1 else "loss"
        do_tasks(args, loaded, trains, tasks, (also,), device, net, sigmas)


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
