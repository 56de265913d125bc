"""Noise-conditional score networks, NCSN (Song, Ermon 2019, arXiv:1907.05600), with the five
techniques of the sequel, NCSNv2 (Song, Ermon 2020, arXiv:2006.09011).

Implements, in the papers' order: Eq. (4), (5), (6); Alg. 1, 2; Fig. 3, 6; Technique 1, 2, 3, 4.

    x               data: 8-bit images scaled linearly          (B, C, H, W) in [0, 1]
    sigmas          noise levels sigma_1 > ... > sigma_L        (L,) float64, with one ratio
    L, T            noise levels; Langevin steps at each
    eps, alpha      step size at sigma_L, and at sigma_i: eps sigma_i^2 / sigma_L^2
    z               noise of the data, of each Langevin step    like x, N(0, I)
    score(x, sigma) the network s_theta, sigma (B,)             like x

    python ncsn.py                                              train on digits, sample
    python ncsn.py --dataset gmm                                Fig. 3: annealed Langevin or not
    python ncsn.py --dataset cifar10                            the sequel's run
    python ncsn.py --dataset cifar10 --settings 2019            the first paper's run
    python ncsn.py --checkpoint runs/ncsn-digits/checkpoint.pt --task inpaint

A Langevin step is that of Eq. (4) and Alg. 1: x + alpha / 2 score + sqrt(alpha) z. The sequel
writes x + alpha score + sqrt(2 alpha) z: its 6.2e-6 is eps = 1.24e-5 here. Technique 5, the EMA of
the weights, is in fit. The released code takes twice the step of Alg. 1, drops the last update, and
imposes the known pixels before a level too; its toy starts at sigma 20, as here; the text says 10.
README.md has measured results. Deviations from the papers:
1. The network is DDPM's U-Net, not a RefineNet; with --settings 2019 it takes the level's index as
   its time, where the paper has conditional instance normalisation.
2. The EMA decay after n steps is min(decay, (1 + n) / (10 + n)), to forget the initial weights.
3. Technique 2 is solved for an overlap of 0.5 exactly; the published ladders have 0.57.
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


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


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


def ncsn_loss(score, x, sigmas):
    """Denoising score matching at a random level for each image, weighted by lambda = sigma^2.
    x (B, ...), sigmas (L,). Scalar: sum over dimensions, mean over the batch. A score of 0 has the
    same loss at every level, dim / 2 in expectation: hence this lambda (Sec. 4.2)."""
    sigma = sigmas[torch.randint(len(sigmas), (len(x),), device=x.device)].to(x.dtype)  # (B,)
    z = torch.randn_like(x)
    s = score(x + expand(sigma, x) * z, sigma)
    # sigma^2 / 2 |s + (x_tilde - x) / sigma^2|^2 with x_tilde = x + sigma z
    return 0.5 * (expand(sigma, x) * s + z).square().flatten(1).sum(1).mean()  # Eq. (5), (6)


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


@torch.no_grad()
def inpaint(score, x, mask, x_init, sigmas, eps, T, denoise=False, record=None):
    """Alg. 2, Fig. 6: images like x whose pixels are x's, with noise sigma_L, where mask is 1.
    x (B, ...): the given images, mask: 0 or 1, broadcasts against x; x_init (B, ...): the chain's
    start, in the papers U[0, 1]. The other arguments are those of annealed_langevin; denoise ends
    with the mean of the data given x_t, also where mask is 1 (ours)."""
    x_t, recorded, step = x_init, record_steps(len(sigmas) * T), 0
    for sigma in sigmas:  # Alg. 2, line 2
        alpha = eps * sigma**2 / sigmas[-1] ** 2  # Alg. 2, line 3
        level = sigma.to(x.dtype).expand(len(x))  # (B,)
        y = x + sigma * torch.randn_like(x)  # Alg. 2, lines 4, 5: one noisy image for the level
        for _ in range(T):
            z = torch.randn_like(x)
            x_t = x_t + alpha / 2 * score(x_t, level) + alpha.sqrt() * z  # Alg. 2, line 8
            x_t = x_t * (1 - mask) + y * mask  # Alg. 2, line 9
            step += 1
            if record is not None and step in recorded:
                record.append(x_t)
    if denoise:
        x_t = x_t + sigma**2 * score(x_t, level)
        if record is not None:
            record.append(x_t)
    return x_t


# The toy of Sec. 3.2 and Fig. 3: 1/5 N((-5, -5), I) + 4/5 N((5, 5), I)


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


# NCSNv2: five techniques


def max_pairwise_distance(data):
    """Technique 1, for sigma_1: the largest Euclidean distance between two of data (N, ...)."""
    parts = data.flatten(1).split(1000)  # so that only a few at a time become floats
    pairs = ((a, b) for i, a in enumerate(parts) for b in parts[i:])
    return max(torch.cdist(a.float(), b.float()).max().item() for a, b in pairs)


def scales_technique2(sigma_1, sigma_L, dim):
    """Technique 2: the number of levels at which neighbours overlap by 0.5, rounded, at least 2.
    The norm of noise is about N(sqrt(dim) sigma, sigma^2 / 2); the overlap is the probability
    that a level's norm is within 3 deviations of the one above. ValueError unless sigma_1 > sigma_L
    > 0 and dim is 5 or more: below, all levels overlap by more."""

    def overlap(gamma):  # of levels sigma and gamma sigma
        shift = math.sqrt(2 * dim) * (gamma - 1)
        bounds = torch.tensor([shift + 3 * gamma, shift - 3 * gamma], dtype=torch.float64)
        upper, lower = torch.special.ndtr(bounds).tolist()
        return upper - lower  # Technique 2

    low, high = 1.0, 1e3  # the overlap falls from 0.997 as gamma rises
    if not sigma_1 > sigma_L > 0:
        raise ValueError(f"sigma from {sigma_1} to {sigma_L} does not fall: are all data equal?")
    if overlap(high) > 0.5:
        raise ValueError(f"in {dim} dimensions all levels overlap by more than 0.5")
    for _ in range(60):
        gamma = (low + high) / 2
        low, high = (gamma, high) if overlap(gamma) > 0.5 else (low, gamma)
    return max(2, round(1 + math.log(sigma_1 / sigma_L) / math.log(gamma)))


def noise_conditional_score(net, sigmas, settings):
    """score(x, sigma) from a network of images in [-1, 1] and a time. settings "2019": the time is
    the level's index, the output the score; "2020": the time is 0, the output / sigma the score."""

    def score(x, sigma):
        if settings == "2020":
            return net(2 * x - 1, 0 * sigma) / expand(sigma, x)  # Technique 3
        index = (sigmas.to(sigma.dtype) - sigma[:, None]).abs().argmin(1)
        return net(2 * x - 1, index)

    return score


def step_technique4(sigmas, T):
    """Technique 4: the step a, in the sequel's convention x + a score + sqrt(2 a) z, with which T
    steps at a level leave noise of the level's variance; twice that is Alg. 1's eps.
    ValueError for a single level, which has no ratio."""
    if len(sigmas) < 2:
        raise ValueError("a single level has no ratio to derive a step from: --eps needs a number")
    gamma = (sigmas[0] / sigmas[-1]).item() ** (1 / (len(sigmas) - 1))
    a = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]  # a / sigma_L^2
    # b = 2 a / (sigma_L^2 - sigma_L^2 (1 - a / sigma_L^2)^2), in units of sigma_L
    b = 2 / (2 - a)
    ratio = (1 - a) ** (2 * T) * (gamma**2 - b) + b  # variance after T steps / sigma_i^2
    return a[(ratio - 1).abs().argmin()].item() * sigmas[-1].item() ** 2  # Technique 4


# ---- The run -------------------------------------------------------------------------------------

SETTINGS = dict(  # CIFAR-10 as the sequel published it, with sources; every key is a flag
    lr=1e-4, batch_size=128, ema_decay=0.999, steps=300_000, flip=True, image_size=(32, 32),
    channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,),
    dropout=0.0, warmup=0, lr_decay=0.0, grad_clip=0.0,  # the U-Net is DDPM's
    num_samples=100, sample_batch_size=256, log_every=100, save_every=5000,  # ours
    settings=(("2020", "2019"), "2020: the sequel's; 2019: the first paper's"),
    dequantize=(False, "train on (v + u) / 256 with u uniform, not on v / 255"),
    sigma_max=(50.0, "sigma_1, 0: measured (Technique 1)"),
    sigma_min=(0.01, "sigma_L"),
    levels=(232, "L, 0: by Technique 2, 1: plain Langevin dynamics"),
    T=(5, "Langevin steps at each level (Alg. 1)"),
    eps=(2 * 6.2e-6, "step size of Alg. 1, 0: twice Technique 4's"),
    denoise=(True, "end with the mean of the data given the last sample"),
    num_test=(4, "test images that task inpaint completes"),
)
AUTO = dict(sigma_max=0.0, levels=0, eps=0.0, flip=False)
MNIST = AUTO | dict(
    image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": AUTO, "mnist": MNIST, "fashion_mnist": MNIST,
    "digits": AUTO | dict(  # not in the papers: trains in minutes on a laptop
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(8,), lr=8e-3, batch_size=64, steps=4000, warmup=500, lr_decay=1.2,
        save_every=500,
    ),
    "gmm": dict(  # Fig. 3 and the first paper's appendix; ours: 10,000, for a precise share
        sigma_max=20.0, sigma_min=1.0, levels=10, T=100, eps=0.1, denoise=False, flip=False,
        num_samples=10_000,
    ),
}


def preset(args):
    changes = PRESETS.get(args.dataset, PRESETS["folder"])
    if args.settings == "2019" and args.dataset != "gmm":  # the first paper's, Sec. 5
        changes = changes | dict(sigma_max=1.0, levels=10, T=100, eps=2e-5, denoise=False,
                                 dequantize=True, ema_decay=0.0)
        if args.dataset != "digits":
            changes |= dict(lr=1e-3, steps=200_000)
    if args.levels == 1:  # plain Langevin dynamics, both papers' baseline, has no sigma_1
        changes = changes | dict(T=1000, eps=2e-5, denoise=False, sigma_max=1.0)
    return changes


def to_float(images):
    return images.float() / 255


def to_uint8(x):
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def start_of_chains(run, n):
    return torch.rand(n, run.image_channels, *run.image_size, device=run.device)  # U[0, 1]


def loss(run, images):
    x = to_float(images)
    if run.dequantize:
        x = (255 * x + torch.rand_like(x)) / 256  # released code, not in the paper
    return ncsn_loss(run.score, x, run.sigmas)


def sample(run):
    """Samples; process.png: a test image with the noise of each column, then eight chains."""

    def draw(first, n, record):
        x = start_of_chains(run, n)
        if record is not None:
            record.append(x)
        return to_uint8(annealed_langevin(run.score, x, **run.chain, record=record))

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
    return {"n": run.num_samples, **run.measured}


def inpainting(run):
    """Fig. 6: test images without their left half, right half or centre, six completions each."""
    x, (H, W), rows = to_float(run.test[: run.num_test]), run.image_size, []
    masks = x.new_ones(3, 1, 1, H, W)
    masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0
    masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0
    for mask in masks:
        for known in x.split(max(1, run.sample_batch_size // 6)):
            six = known.repeat(6, 1, 1, 1)
            filled = inpaint(run.score, six, mask, start_of_chains(run, len(six)), **run.chain)
            filled = six * mask + filled * (1 - mask)  # the given pixels without their noise
            parts = [known * mask + 0.5 * (1 - mask), *filled.chunk(6), known]
            rows.append(torch.stack(parts, dim=1).flatten(0, 1))  # image by image
    save_grid(to_uint8(torch.cat(rows)), run.out / "inpainting.png", columns=8)
    return {"n": len(x), "split": "test", "completions": 6, **run.measured}


def histogram(x, title):
    """Points (N, 2) in the square [-10, 10]^2, y upwards, as an image (1, 324, 324)."""
    counts = torch.histogramdd(x.cpu().flip(1), 81, range=[-10, 10] * 2).hist.flip(0)
    shade = 255 * (1 - (counts / counts.max().clamp(min=1)).sqrt())
    picture = to_pil_image(shade.to(torch.uint8)).resize((324, 324), Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def toy(run):
    """Fig. 3: with the exact score, the share of samples at the mode whose weight is 0.2."""
    x = 16 * torch.rand(run.num_samples, 2, device=run.device) - 8  # U[-8, 8]^2
    zero, steps = x.new_zeros(len(x)), run.levels * run.T
    points = {
        "i.i.d. draws": gmm_sample(len(x)).to(run.device),
        "Langevin": langevin(lambda x: gmm_score(x, zero), x, run.eps, steps),
        "annealed Langevin": annealed_langevin(gmm_score, x, **run.chain),
    }
    if not all(x.isfinite().all() for x in points.values()):
        raise ValueError(f"the chains diverge: --eps {run.eps} is too large for these levels")
    share = {name: (x.sum(1) < 0).float().mean().item() for name, x in points.items()}
    for name in points:
        print(f"{name}: {share[name]:.3f} of {len(x)} at (-5, -5), where 0.2 is right")
    pictures = [histogram(points[name], f"{name}: {share[name]:.2f}") for name in points]
    save_grid(torch.stack(pictures), run.out / "gmm.png", columns=3)
    return {"n": len(x), "share_at_-5": share, **run.measured,
            "weights": "none, the score is exact", "step": 0, "settings": "Fig. 3"}


TASKS = {"sample": sample, "inpaint": inpainting}


def main(argv=None):
    with one_line_errors():
        fixed = ("settings", "sigma_max", "sigma_min", "levels")
        run = read_args(argv, SETTINGS, preset, TASKS, fixed)
        is_toy = run.dataset == "gmm"
        if is_toy and (run.checkpoint or run.task != "sample"):
            raise ValueError("--dataset gmm takes --task sample and no --checkpoint")
        setup(run)
        data = None if is_toy else load_data(run)
        if data and not run.sigma_max:  # the sequel takes 10,000 of more than 60,000 images
            few = torch.randperm(len(data[0]))[: 10_000 if len(data[0]) > 60_000 else None]
            run.sigma_max = max_pairwise_distance(data[0][few.to(data[0].device)]) / 255
        if data and not run.levels:
            run.levels = scales_technique2(run.sigma_max, run.sigma_min, data[0][0].numel())
        sigmas = geometric_sigmas(run.sigma_max, run.sigma_min, run.levels)
        run.eps = run.eps or 2 * step_technique4(sigmas, run.T)
        dtype = torch.float32 if run.device.type == "mps" else torch.float64  # mps has no float64
        run.sigmas = sigmas.to(run.device, dtype)
        run.chain = dict(sigmas=run.sigmas, eps=run.eps, T=run.T, denoise=run.denoise)
        run.measured = {key: getattr(run, key) for key in (*fixed, "T", "eps", "denoise")}
        run.measured["evaluations"] = run.levels * run.T + run.denoise
        print("L = {levels}, sigma from {sigma_max:.4g} to {sigma_min:.4g}, T = {T}, "
              "eps = {eps:.3g}".format(**run.measured))
        if not is_toy:
            net = prepare(run, UNet(run.image_channels, run.image_channels, **run.unet))
            run.score = noise_conditional_score(net, run.sigmas, run.settings)
        if data:
            fit(run.net, lambda images: loss(run, images), data[:1], run)
        do_tasks(run, {"sample": toy} if is_toy else TASKS)


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
