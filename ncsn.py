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


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


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


@torch.no_grad()
def inpaint(score, x, mask, x_init, sigmas, eps, T, denoise=False, callback=None):
    """Alg. 2, Fig. 6: images like x whose pixels are x's, with noise sigma_L, where mask is 1.
    x (B, ...): the given images, mask: 0 or 1, broadcasts against x; x_init (B, ...): the chain's
    start, in the papers U[0, 1]. The other arguments are those of annealed_langevin; denoise ends
    with the mean of the data given x_t, also where mask is 1 (ours)."""
    callback = (lambda n, x_t: None) if callback is None else callback
    x_t, n = x_init, len(sigmas) * T  # n steps are left
    for sigma in sigmas:  # Alg. 2, line 2
        alpha = eps * sigma**2 / sigmas[-1] ** 2  # Alg. 2, line 3
        level = sigma.to(x.dtype).expand(len(x))  # (B,)
        y = x + sigma * torch.randn_like(x)  # Alg. 2, lines 4, 5: one noisy image for the level
        for _ in range(T):
            callback(n, x_t)
            z = torch.randn_like(x)
            x_t = x_t + alpha / 2 * score(x_t, level) + alpha.sqrt() * z  # Alg. 2, line 8
            x_t = x_t * (1 - mask) + y * mask  # Alg. 2, line 9
            n -= 1
    if denoise:
        x_t = x_t + sigma**2 * score(x_t, level)
    callback(0, x_t)
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

METHOD = "ncsn"  # in checkpoints
FIXED = ("settings", "sigma_max", "sigma_min", "levels", "dequantize")  # a checkpoint decides these
READS = {}  # other methods' checkpoints, and settings that these lack
SETTINGS = dict(  # CIFAR-10 as the sequel published it, with sources; every key is a flag
    lr=1e-4, batch_size=128, ema_decay=0.999, steps=300_000, flip=True, image_size=[32, 32],
    channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2, attention_resolutions=[16],
    dropout=0.0, warmup=0, grad_clip=0.0,  # the U-Net is DDPM's
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
    image_size=[28, 28], channels=64, channel_mult=[1, 2, 2], attention_resolutions=[14],
)
PRESETS = {  # changes to SETTINGS
    "cifar10": {}, "folder": AUTO, "mnist": MNIST, "fashion_mnist": MNIST,
    "digits": AUTO | dict(  # not in the papers: trains in minutes on a laptop
        image_size=[16, 16], channels=16, channel_mult=[1, 2, 4], num_res_blocks=1,
        attention_resolutions=[8], lr=8e-3, batch_size=64, steps=4000, warmup=500, lr_decay=1.2,
        save_every=500,
    ),
    "gmm": dict(  # Fig. 3 and the first paper's appendix; ours: 10,000, for a precise share
        sigma_max=20.0, sigma_min=1.0, levels=10, T=100, eps=0.1, denoise=False, flip=False,
        num_samples=10_000, steps=0,  # the score is exact
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


def to_uint8(args, x):
    """The inverse of what is trained on: (v + u) / 256 or v / 255 is level v."""
    if not x.isfinite().all():
        raise ValueError("a sample is not finite: --eps is too large for these levels")
    return (256 * x if args.dequantize else 255 * x + 0.5).clamp(0, 255).to(torch.uint8)


def technique1(images):
    """sigma_1 for uint8 images. The sequel takes 10,000 of more than 60,000."""
    few = torch.randperm(len(images))[: 10_000 if len(images) > 60_000 else None]
    return max_pairwise_distance(images[few.to(images.device)]) / 255


def start_of_chains(args, device, n):
    return torch.rand(n, args.image_channels, *args.image_size, device=device)  # U[0, 1]


def loss(args, net, sigmas, images):
    x = to_float(images)
    if args.dequantize:
        x = (255 * x + torch.rand_like(x)) / 256  # released code, not in the paper
    return ncsn_loss(noise_conditional_score(net, sigmas, args.settings), x, sigmas)


def draw(args, device, net, sigmas, n, callback=None):
    score, x = noise_conditional_score(net, sigmas, args.settings), start_of_chains(args, device, n)
    return annealed_langevin(score, x, sigmas, args.eps, args.T, args.denoise, callback)


def sample(args, device, net, sigmas):
    net, states = fast(net, args, device), {}
    for first, n in batches(args):
        x = draw(args, device, net, sigmas, n, partial(keep, states))
        save_images(to_uint8(args, x), first, args)
    save_pictures(args, states, lambda x: to_uint8(args, x))
    return {"n": args.num_samples, "evaluations": args.levels * args.T + args.denoise}


def inpainting(args, device, net, sigmas):
    """Fig. 6: test images without their left half, right half or centre, six completions each."""
    score = noise_conditional_score(fast(net, args, device), sigmas, args.settings)
    x, (H, W), rows = to_float(load_images(args, device, args.num_test)[0]), args.image_size, []
    masks = x.new_ones(3, 1, 1, H, W)
    masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0
    masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0
    six = x.repeat(6, 1, 1, 1)
    for mask in masks:
        filled = inpaint(score, six, mask, start_of_chains(args, device, len(six)), sigmas,
                         args.eps, args.T, args.denoise)
        filled = six * mask + filled * (1 - mask)  # the given pixels without their noise
        parts = [x * mask + 0.5 * (1 - mask), *filled.chunk(6), x]
        rows.append(torch.stack(parts, dim=1).flatten(0, 1))  # image by image
    save_grid(to_uint8(args, torch.cat(rows)), Path(args.out, "inpainting.png"), columns=8)
    return {"n": len(x), "split": "test", "completions": 6}


def histogram(x, title):
    """Points (N, 2) in the square [-10, 10]^2, y upwards, as an image (1, 324, 324)."""
    counts = torch.histogramdd(x.cpu().flip(1), 81, range=[-10, 10] * 2).hist.flip(0)
    shade = 255 * (1 - (counts / counts.max().clamp(min=1)).sqrt())
    picture = to_pil_image(shade.to(torch.uint8)).resize((324, 324), Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def toy(args, device, sigmas):
    """Fig. 3: with the exact score, the share of samples at the mode whose weight is 0.2."""
    x = 16 * torch.rand(args.num_samples, 2, device=device) - 8  # U[-8, 8]^2
    zero, steps = x.new_zeros(len(x)), args.levels * args.T
    points = {
        "i.i.d. draws": gmm_sample(len(x)).to(device),
        "Langevin": langevin(lambda x: gmm_score(x, zero), x, args.eps, steps),
        "annealed Langevin": annealed_langevin(gmm_score, x, sigmas, args.eps, args.T,
                                               args.denoise),
    }
    if not all(x.isfinite().all() for x in points.values()):
        raise ValueError(f"the chains diverge: --eps {args.eps} is too large for these levels")
    share = {name: (x.sum(1) < 0).float().mean().item() for name, x in points.items()}
    for name in points:
        print(f"{name}: {share[name]:.3f} of {len(x)} at (-5, -5), where 0.2 is right")
    pictures = [histogram(points[name], f"{name}: {share[name]:.2f}") for name in points]
    save_grid(torch.stack(pictures), Path(args.out, "gmm.png"), columns=3)
    return {"n": len(x), "share_at_-5": share}


TASKS = {"sample": sample, "inpaint": inpainting}


def main(argv=None):
    args, loaded, trains = read_args(argv)
    is_toy = args.dataset == "gmm"
    if is_toy and (loaded or args.task != "sample"):
        raise ValueError("--dataset gmm takes --task sample, no --checkpoint and no --resume")
    device = setup(args)
    if trains and not is_toy:
        images, _ = load_images(args, device)
        args.image_channels = images.shape[1]
        args.sigma_max = args.sigma_max or technique1(images)
        args.levels = args.levels or scales_technique2(
            args.sigma_max, args.sigma_min, images[0].numel())
    sigmas = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    args.eps = args.eps or 2 * step_technique4(sigmas, args.T)
    # mps has no float64
    sigmas = sigmas.to(device, torch.float32 if device.type == "mps" else torch.float64)
    print("L = {levels}, sigma from {sigma_max:.4g} to {sigma_min:.4g}, T = {T}, "
          "eps = {eps:.3g}".format(**vars(args)))
    if is_toy:
        return do_tasks(args, loaded, trains, {"sample": toy}, (), device, sigmas)
    C = args.image_channels
    net = UNet(C, C, **{key: getattr(args, key) for key in UNET}).to(device)
    if trains:
        fit(net, lambda model, x: loss(args, model, sigmas, x), [images], args, device, loaded,
            lambda ema: to_uint8(args, draw(args, device, ema, sigmas, args.preview)))
    else:
        net.load_state_dict(loaded["ema"])
    net.eval().requires_grad_(False)
    do_tasks(args, loaded, trains, TASKS, (), device, net, sigmas)


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
