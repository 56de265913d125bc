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

A Langevin step is Eq. (4)'s and Alg. 1's throughout: x + alpha / 2 score + sqrt(alpha) z. The
sequel writes x + alpha score + sqrt(2 alpha) z, so that its 6.2e-6 is eps = 1.24e-5 here. Its
Technique 5, the EMA of the weights, is in fit. Measured results stand in README.md. Deviations,
from the released code too: it takes twice the step of Alg. 1, loses the last update, and puts the
known pixels in before a level as well; its toy begins at sigma 20, as here, the text's at 10.
1. The network is DDPM's U-Net, not a RefineNet; with --settings 2019 it takes the level's index for
   its time, where the paper has conditional instance normalisation.
2. EMA decay min(decay, (1 + n) / (10 + n)) after n steps: the initial weights leave early.
3. Technique 2 is solved for an overlap of 0.5 exactly; the published ladders have 0.57.
"""

import math

import torch

# ---- The method ----------------------------------------------------------------------------------


@torch.no_grad()
def langevin(score, x, eps, T, record=None):
    """T steps of Langevin dynamics, each of size eps, from x (B, ...); here score(x) is like x.

    record: a list to which at most 15 states are appended, evenly spaced, the last among them.
    """
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
    """The at most 15 evenly spaced steps of 1..T whose states a sampler records, ascending."""
    return sorted({-(-T * k // 15) for k in range(1, 16)})


def geometric_sigmas(sigma_1, sigma_L, L):
    """Levels sigma_1 > ... > sigma_L of one ratio, (L,) float64 (Sec. 4.1). L = 1: (sigma_L,).

    ValueError unless L >= 1 and sigma_1 > sigma_L > 0 (or L = 1).
    """
    if L < 1 or sigma_L <= 0 or (L > 1 and sigma_1 <= sigma_L):
        raise ValueError(f"sigma from {sigma_1} to {sigma_L} in {L} levels: not L >= 1, falling")
    if L == 1:
        return torch.tensor([sigma_L], dtype=torch.float64)
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), L, dtype=torch.float64)


def ncsn_loss(score, x, sigmas):
    """Denoising score matching at a random level for each image, weighted by lambda = sigma^2.

    x (B, ...), sigmas (L,). Scalar: sum over dimensions, mean over the batch. A score of 0 has the
    same loss at every level, dim / 2 in expectation: hence this lambda (Sec. 4.2).
    """
    sigma = sigmas[torch.randint(len(sigmas), (len(x),), device=x.device)].to(x.dtype)  # (B,)
    z = torch.randn_like(x)
    s = score(x + expand(sigma, x) * z, sigma)
    # sigma^2 / 2 |s + (x_tilde - x) / sigma^2|^2 with x_tilde = x + sigma z
    return 0.5 * (expand(sigma, x) * s + z).square().flatten(1).sum(1).mean()  # Eq. (5), (6)


@torch.no_grad()
def annealed_langevin(score, x, sigmas, eps, T, denoise=False, record=None):
    """Alg. 1 from x (B, ...), the papers' is U[0, 1]: L T evaluations of score(x, sigma).

    eps: the step size at sigma_L. denoise: one evaluation more, to the mean of the data given x
    (NCSNv2, Alg. 1). record: as of langevin, followed by the denoised state.
    """
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
    start, the papers' is U[0, 1]. The other arguments are those of annealed_langevin; denoise ends
    with the mean of the data everywhere, where mask is 1 too (ours).
    """
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
    # of the modes at m = (5, 5) and -m the first has the posterior r = sigmoid(log of their ratio)
    log_ratio = math.log(4) + 10 * x.sum(1, keepdim=True) / variance
    return (5 * (2 * log_ratio.sigmoid() - 1) - x) / variance


# NCSNv2: five techniques


@torch.no_grad()
def max_pairwise_distance(data):
    """Technique 1, for sigma_1: the largest Euclidean distance of two of data (N, ...)."""
    data = data.flatten(1)
    parts = range(0, len(data), 1000)
    return max(torch.cdist(data[i : i + 1000], data[i:]).max().item() for i in parts)


def scales_technique2(sigma_1, sigma_L, dim):
    """Technique 2: the number of levels at which neighbours overlap by 0.5, rounded, at least 2.

    The norm of noise is about N(sqrt(dim) sigma, sigma^2 / 2); the overlap is the probability of
    a level's noise within 3 deviations of the level above it. ValueError unless sigma_1 > sigma_L
    > 0 and dim is 5 or more: below, all levels overlap by more.
    """

    def overlap(gamma):  # of levels sigma and gamma sigma
        shift = math.sqrt(2 * dim) * (gamma - 1)
        bounds = torch.tensor([shift + 3 * gamma, shift - 3 * gamma], dtype=torch.float64)
        upper, lower = torch.special.ndtr(bounds).tolist()
        return upper - lower  # Technique 2

    low, high = 1.0, 1e3  # the overlap falls from 0.997 as gamma rises
    if not sigma_1 > sigma_L > 0:
        raise ValueError(f"sigma from {sigma_1} to {sigma_L} is not falling: are all data equal?")
    if overlap(high) > 0.5:
        raise ValueError(f"in {dim} dimensions all levels overlap by more than 0.5")
    for _ in range(60):
        gamma = (low + high) / 2
        low, high = (gamma, high) if overlap(gamma) > 0.5 else (low, gamma)
    return max(2, round(1 + math.log(sigma_1 / sigma_L) / math.log(gamma)))


def unconditional_score(net, x, sigma):
    """Technique 3: net(x) / sigma, a network that does not see sigma (B,)."""
    return net(x) / expand(sigma, x)


def step_technique4(sigmas, T):
    """Technique 4: the step a, in the sequel's convention x + a score + sqrt(2 a) z, with which T
    steps at a level leave noise of the level's variance; twice that is Alg. 1's eps.

    ValueError for one level alone, which no other precedes.
    """
    if len(sigmas) < 2:
        raise ValueError("one level has no ratio to choose its step size by: --eps needs a number")
    gamma = (sigmas[0] / sigmas[-1]).item() ** (1 / (len(sigmas) - 1))
    a = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]  # a / sigma_L^2
    # b = 2 a / (sigma_L^2 - sigma_L^2 (1 - a / sigma_L^2)^2), in units of sigma_L
    b = 2 / (2 - a)
    ratio = (1 - a) ** (2 * T) * (gamma**2 - b) + b  # variance after T steps / sigma_i^2
    return a[(ratio - 1).abs().argmin()].item() * sigmas[-1].item() ** 2  # Technique 4


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

PRESETS = {
    "cifar10": dict(  # as the sequel published it: --settings 2020
        sigma_max=50.0, sigma_min=0.01, levels=232, T=5, eps=2 * 6.2e-6, denoise=True,
        dequantize=False, lr=1e-4, batch_size=128, steps=300_000, ema_decay=0.999, flip=True,
        image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,  # DDPM's
        attention_resolutions=(16,), dropout=0.0, warmup=0, grad_clip=0.0, lr_decay=0.0,
        num_samples=100, sample_batch_size=256, num_test=4, log_every=100, save_every=5000,  # ours
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(sigma_max="auto", levels="auto", eps="auto", flip=False),
    # Digits are not in the papers at this size: these are ours, sized for minutes on a laptop.
    digits=PRESETS["cifar10"] | dict(
        sigma_max="auto", levels="auto", eps="auto", image_size=(16, 16), channels=16,
        channel_mult=(1, 2, 4), num_res_blocks=1, attention_resolutions=(8,), lr=8e-3,
        batch_size=64, steps=4000, warmup=500, lr_decay=1.2, flip=False, save_every=500,
    ),
    mnist=PRESETS["cifar10"] | dict(
        sigma_max="auto", levels="auto", eps="auto", image_size=(28, 28), channels=64,
        channel_mult=(1, 2, 2), attention_resolutions=(14,), flip=False,  # ours
    ),
    gmm=PRESETS["cifar10"] | dict(  # NCSN, Fig. 3 and its appendix: no network, no training
        sigma_max=20.0, sigma_min=1.0, levels=10, T=100, eps=0.1, denoise=False, flip=False,
        num_samples=10_000,  # ours, for an exact percentage
    ),
)
PRESETS.update(fashion_mnist=PRESETS["mnist"])
for name in ("cifar10", "folder", "digits", "mnist", "fashion_mnist"):
    PRESETS[f"{name} --settings 2019"] = dict(  # the first paper's, Sec. 5
        sigma_max=1.0, levels=10, T=100, eps=2e-5, denoise=False, dequantize=True, ema_decay=0.0,
    ) | (dict(lr=1e-3, steps=200_000) if name != "digits" else {})
    # plain Langevin dynamics, the baseline of both papers; sigma_max has no part in it
    PRESETS[f"{name} --levels 1"] = dict(T=1000, eps=2e-5, denoise=False, sigma_max=1.0)


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], ("sample", "inpaint"))

    def auto(parse):
        def parse_or_auto(text):
            return text if text == "auto" else parse(text)

        parse_or_auto.__name__ = parse.__name__
        return parse_or_auto

    add, positive = parser.add_argument, number(float, 1e-12)
    add("--settings", choices=("2019", "2020"), default="2020", help="of NCSN, or of its sequel")
    add("--sigma-max", type=auto(positive), help="sigma_1; auto: measured, Technique 1")
    add("--sigma-min", type=positive, help="sigma_L")
    add("--levels", type=auto(number(int, 1)), help="L; auto: Technique 2; 1: plain Langevin")
    add("--T", type=number(int, 1), help="Langevin steps at each level (Alg. 1)")
    add("--eps", type=auto(positive), help="step size of Alg. 1; auto: twice Technique 4's")
    flag = argparse.BooleanOptionalAction
    add("--denoise", action=flag, help="end with the mean of the data given the last sample")
    add("--dequantize", action=flag, help="train on (v + u) / 256 with u uniform, not on v / 255")
    add("--num-test", type=number(int, 1), help="test images that --task inpaint completes")
    fixed = ("settings", "sigma_max", "sigma_min", "levels")
    args = read_args(parser, PRESETS, argv, fixed=fixed, variants=("settings", "levels"))
    if args.dataset == "gmm" and (args.checkpoint or args.task != "sample"):
        fail("--dataset gmm takes --task sample and no --checkpoint")
    if args.dataset == "gmm" and "auto" in (args.sigma_max, args.levels):
        fail("--dataset gmm takes numbers for --sigma-max and --levels")
    return args


def histogram(x, title, extent=10):
    """Points (N, 2) in a square of [-extent, extent]^2, y upwards, as an image (1, 324, 324)."""
    edges = np.linspace(-extent, extent, 82)
    counts = np.histogram2d(x[:, 1].cpu().numpy(), x[:, 0].cpu().numpy(), (edges, edges))[0][::-1]
    shade = 255 * (1 - np.sqrt(counts / max(1, counts.max())))
    picture = Image.fromarray(shade.astype(np.uint8)).resize((324, 324), Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    device = setup(args)

    def to_float(images):
        return images.to(device).float() / 255

    def to_uint8(x):
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)

    data = None
    if args.dataset != "gmm" and not args.checkpoint:
        data = load_split(args, train=True)[:1]
        test_images(args, 1)  # what is wrong with them is said now, not after the training
        if args.sigma_max == "auto":
            few = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(args.seed))
            few = few[:10_000] if len(few) > 60_000 else few  # as the sequel does
            args.sigma_max = max_pairwise_distance(to_float(data[0][few]))
        if args.levels == "auto":
            args.levels = scales_technique2(args.sigma_max, args.sigma_min, data[0][0].numel())
    elif args.checkpoint and args.task == "inpaint":
        test_images(args, 1)
    sigmas = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    eps = 2 * step_technique4(sigmas, args.T) if args.eps == "auto" else args.eps
    sigmas = sigmas.to(device, torch.float32 if device.type == "mps" else torch.float64)
    options = {"sigmas": sigmas, "eps": eps, "T": args.T, "denoise": args.denoise}
    report(f"L = {args.levels}, sigma from {sigmas[0]:.4g} to {sigmas[-1]:.4g}, T = {args.T}, "
           f"eps = {eps:.3g}", last=True)

    def score(x, sigma):
        if args.settings == "2020":  # the network is fed a constant
            return unconditional_score(lambda x: call(net, args, 2 * x - 1, 0 * sigma), x, sigma)
        index = (sigmas.to(sigma.dtype) - sigma[:, None]).abs().argmin(1)
        return call(net, args, 2 * x - 1, index)

    def loss_fn(images):
        x = to_float(images)
        if args.dequantize:
            x = (255 * x + torch.rand_like(x)) / 256  # released code, not in the paper
        return ncsn_loss(score, x, sigmas)

    def start_of_chains(n):
        return torch.rand(n, args.image_channels, *args.image_size, device=device)  # U[0, 1]

    def sample():
        record = []

        def draw(n):
            x = start_of_chains(n)
            if record:
                return to_uint8(annealed_langevin(score, x, **options))
            record.append(x)
            return to_uint8(annealed_langevin(score, x, **options, record=record))

        save_grid(save_images(draw, args), Path(args.out, "samples.png"), columns=10)
        rows, image = [*torch.stack(record, dim=1)[:8]], test_image(args)
        if image is not None:  # the image with the noise of each recorded state
            steps = [1, *record_steps(args.levels * args.T)]
            sigma = torch.stack([sigmas[(step - 1) // args.T] for step in steps])
            sigma = torch.cat([sigma, sigma.new_zeros(int(args.denoise))])  # then none
            x = to_float(image).expand(len(record), -1, -1, -1)
            rows.insert(0, x + expand(sigma, x) * torch.randn_like(x))
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "process.png"), columns=len(record))
        return {"n": args.num_samples}

    def inpainting():
        x, (H, W) = to_float(test_images(args, args.num_test)[0]), args.image_size
        masks, rows = x.new_ones(3, 1, 1, H, W), []
        masks[0, ..., : W // 2] = masks[1, ..., W // 2 :] = 0  # left, right half missing
        masks[2, ..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 0  # the centre
        for mask in masks:
            for known in x.split(max(1, args.sample_batch_size // 6)):
                six = known.repeat(6, 1, 1, 1)  # six completions of each
                filled = inpaint(score, six, mask, start_of_chains(len(six)), **options)
                filled = six * mask + filled * (1 - mask)  # without the noise of what was given
                parts = [known * mask + 0.5 * (1 - mask), *filled.chunk(6), known]
                rows.append(torch.stack(parts, dim=1).flatten(0, 1))  # image by image
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "inpainting.png"), columns=8)
        return {"n": len(x), "split": "test", "completions": 6}

    def toy():
        x = 16 * torch.rand(args.num_samples, 2, device=device) - 8  # U[-8, 8]^2
        zero, steps = x.new_zeros(len(x)), args.levels * args.T
        points = {
            "i.i.d. draws": gmm_sample(len(x)).to(device),
            "Langevin": langevin(lambda x: gmm_score(x, zero), x, eps, steps),
            "annealed Langevin": annealed_langevin(gmm_score, x, **options),
        }
        if not all(x.isfinite().all() for x in points.values()):
            raise ValueError(f"the chains diverge: --eps {eps} is too large for these levels")
        share = {name: (x.sum(1) < 0).float().mean().item() for name, x in points.items()}
        for name in points:
            report(f"{name}: {share[name]:.3f} of {len(x)} at (-5, -5), 0.2 are right", last=True)
        pictures = [histogram(points[name], f"{name}: {share[name]:.2f}") for name in points]
        save_grid(torch.stack(pictures), Path(args.out, "gmm.png"), columns=3)
        return {"n": len(x), "share_at_-5": share, "weights": "none, the score is exact", "step": 0,
                "settings": "Fig. 3"}

    net, tasks = None, {"sample": toy}
    if args.dataset != "gmm":
        net = build_unet(args, args.image_channels, args.image_channels, device)
        tasks = {"sample": sample, "inpaint": inpainting}
    run(args, tasks, net, loss_fn, data, settings=args.settings, sigma_max=sigmas[0].item(),
        sigma_min=args.sigma_min, levels=args.levels, T=args.T, eps=eps, denoise=args.denoise,
        evaluations=args.levels * args.T + args.denoise)


if __name__ == "__main__":
    main()
