"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239).

Implements, in the paper's order: Eq. (2), (4), (5), (6), (7), (11), (12), (13), (14), (15);
Alg. 1, 2; Fig. 8; Table 2 (L), 4.

    t               time, 1 (almost data) ... T (noise)         (B,) int64; the network is fed t - 1
    x_0             data: 8-bit images scaled linearly          (B, C, H, W) in [-1, 1]
    x_t             x_0 after t steps of noise                  (B, C, H, W)
    eps, z          noise of the forward, the reverse process   like x_0, N(0, I)
    beta, alpha     forward variance, 1 - beta                  (T + 1,), index = t, beta[0] = 0
    alpha_bar       product of alpha_1 ... alpha_t              (T + 1,), alpha_bar[0] = 1
    beta_tilde      variance of q(x_{t-1} | x_t, x_0)           (T + 1,), beta_tilde[1] = 0
    model(x_t, t)   the network eps_theta                       like x_t

    python ddpm.py                                              train on digits, sample, bits/dim
    python ddpm.py --dataset cifar10                            the paper's run
    python ddpm.py --checkpoint runs/ddpm-digits/checkpoint.pt --task interpolate

Measured results stand in README.md. Deviations from the paper, 1 to 3 as in the released code:
1. x_0_hat is clipped to [-1, 1] in the sampler and in the bound (--no-clip: Alg. 2 as printed).
2. The learning rate warms up and the gradient norm is clipped at 1.
3. sigma_1^2 is beta_tilde_2; and --objective vlb takes one random term, without the factor T.
4. EMA decay min(decay, (1 + n) / (10 + n)) after n steps: the initial weights leave early.
5. Norms are means over dimensions, not sums: with gradient clipping the scale matters.
6. The decoder's normal CDF is exact; the released code approximates it with a tanh.
7. The bundled digits, not in the paper, have T = 250, beta 0.008 to 0.04, the small variance.
"""

import math

import torch

# ---- The method ----------------------------------------------------------------------------------


class Schedule:
    """Variances beta_1 ... beta_T of the forward process, linear in t, and their products; sections
    and equations of Ho et al. 2020.

    beta, alpha, alpha_bar, beta_tilde: (T + 1,) float64, indexed by the paper's t; entry 0 is the
    data: 0, 1, 1, 0. ValueError unless T >= 2, 0 < beta_1 <= beta_T < 1 and alpha_bar[T] > 1e-70.
    """

    def __init__(self, T=1000, beta_1=1e-4, beta_T=0.02):
        if T < 2 or not 0 < beta_1 <= beta_T < 1:
            raise ValueError(f"T = {T}, beta from {beta_1} to {beta_T}: not T >= 2, 0 < beta < 1")
        self.T = T
        self.beta = torch.zeros(T + 1, dtype=torch.float64)
        self.beta[1:] = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)  # Eq. (2), Sec. 4
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)  # Eq. (4)
        if self.alpha_bar[-1] < 1e-70:  # its root is divided by, in float32
            raise ValueError(f"alpha_bar_T is {self.alpha_bar[-1]:.0e}: lower T or beta_T")
        self.beta_tilde = torch.zeros_like(self.beta)
        ratio = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])
        self.beta_tilde[1:] = ratio * self.beta[1:]  # Eq. (7)

    def to(self, device):
        """Move the tables, in place as a module does it (float32 on mps, which has no float64)."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name in ("beta", "alpha", "alpha_bar", "beta_tilde"):
            setattr(self, name, getattr(self, name).to(device, dtype))
        return self


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def q_sample(x_0, t, eps, schedule):
    """x_t ~ q(x_t | x_0), like x_0; t (B,) in 1..T, or 0 for x_0 itself; eps ~ N(0, I)."""
    of_x_0, of_eps = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
    return expand(of_x_0, x_0) * x_0 + expand(of_eps, x_0) * eps  # Eq. (4)


def q_posterior(x_0, x_t, t, schedule):
    """Mean (B, ...) and variance (B, 1, ..., 1) of q(x_{t-1} | x_t, x_0), Eq. (6); t in 1..T."""
    alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    of_x_0 = alpha_bar_prev.sqrt() * schedule.beta[t] / (1 - alpha_bar)
    of_x_t = schedule.alpha[t].sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = expand(of_x_0, x_t) * x_0 + expand(of_x_t, x_t) * x_t  # Eq. (7)
    return mean, expand(schedule.beta_tilde[t], x_t)  # Eq. (7)


def predict_x_0(x_t, t, eps, schedule):
    """x_0_hat, like x_t: Eq. (4) solved for x_0 with the predicted eps; t in 1..T."""
    alpha_bar = schedule.alpha_bar[t]
    of_x_t, of_eps = (1 / alpha_bar).sqrt(), (1 / alpha_bar - 1).sqrt()
    return expand(of_x_t, x_t) * x_t - expand(of_eps, x_t) * eps  # Eq. (15)


def ddpm_loss(model, x_0, schedule, objective="simple"):
    """Alg. 1, lines 2-5. Scalar: mean over the batch and all dimensions; x_0 in [-1, 1].

    objective "simple": L_simple, 1 in expectation for a model that returns 0. "vlb": the term of
    Eq. (12) at a random t, in nats per dimension; up to a constant, T times its mean is the bound
    with sigma_t^2 = beta_t, where L_0 is taken for a Gaussian's KL too (Table 2's L).
    """
    t = torch.randint(1, schedule.T + 1, (len(x_0),), device=x_0.device)  # Alg. 1, line 3
    eps = torch.randn_like(x_0)  # Alg. 1, line 4
    error = (eps - model(q_sample(x_0, t, eps, schedule), t)).square()  # Eq. (14)
    if objective == "simple":
        return error.mean()
    if objective == "vlb":
        weight = schedule.beta[t] / (2 * schedule.alpha[t] * (1 - schedule.alpha_bar[t]))
        return (expand(weight, error) * error).mean()  # Eq. (12) with sigma_t^2 = beta_t
    raise ValueError(f"objective is {objective!r}, not 'simple' or 'vlb'")


def p_mean_variance(model, x_t, t, schedule, variance="large", clip=True):
    """Mean (B, ...), variance (B, 1, ..., 1) of p(x_{t-1} | x_t), and x_0_hat; t (B,) in 1..T.

    variance "large": beta_t, best for x_0 ~ N(0, I); "small": beta_tilde_t, best for one fixed x_0
    (Sec. 3.2). At t = 1 both are beta_tilde_2, as released: only the decoder Eq. (13) sees it.
    """
    if variance not in ("large", "small"):
        raise ValueError(f"variance is {variance!r}, not 'large' or 'small'")
    x_0_hat = predict_x_0(x_t, t, model(x_t, t), schedule)  # Eq. (15)
    if clip:
        x_0_hat = x_0_hat.clamp(-1, 1)  # released code, not in the paper
    mean, _ = q_posterior(x_0_hat, x_t, t, schedule)  # unclipped, Eq. (15) in Eq. (7) is Eq. (11)
    table = schedule.beta if variance == "large" else schedule.beta_tilde
    return mean, expand(torch.where(t > 1, table[t], schedule.beta_tilde[2]), x_t), x_0_hat


def record_steps(T):
    """The at most 15 evenly spaced steps of 1..T whose states a sampler records, ascending."""
    return sorted({-(-T * k // 15) for k in range(1, 16)})


@torch.no_grad()
def ddpm_sample(model, x_T, schedule, variance="large", clip=True, t_start=None, record=None):
    """Alg. 2: x_T ~ N(0, I) -> x_0, like x_T, in T evaluations of the model.

    t_start: begin at this step, with x_T as its x_t. record: a list that gets x_t at the steps of
    record_steps, from t_start down, and x_0.
    """
    x_t, t_start = x_T, schedule.T if t_start is None else t_start
    recorded = () if record is None else record_steps(t_start)
    for step in range(t_start, 0, -1):  # Alg. 2, line 2
        if step in recorded:
            record.append(x_t)
        t = torch.full((len(x_t),), step, device=x_t.device)
        mean, var, _ = p_mean_variance(model, x_t, t, schedule, variance, clip)
        z = torch.randn_like(x_t) if step > 1 else torch.zeros_like(x_t)  # Alg. 2, line 3
        x_t = mean + var.sqrt() * z  # Alg. 2, line 4
    if record is not None:
        record.append(x_t)
    return x_t


def decoder_log_prob(x_0, mean, var):
    """log p(x_0 | x_1) in nats, like x_0: the mass that N(mean, var) puts on each pixel's level.

    x_0: 8-bit levels v as v / 127.5 - 1; the lowest and the highest level own the tails.
    """
    upper = torch.where(x_0 > 0.999, math.inf, (x_0 + 1 / 255 - mean) / var.sqrt())  # Eq. (13)
    lower = torch.where(x_0 < -0.999, -math.inf, (x_0 - 1 / 255 - mean) / var.sqrt())  # Eq. (13)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)  # Eq. (13)
    return mass.clamp(min=1e-12).log()  # the floor: released code, not in the paper


@torch.no_grad()
def bits_per_dim(model, x_0, schedule, variance="large", clip=True):
    """The variational bound on -log2 p(x_0) per dimension, each term of Eq. (5) with one x_t.

    x_0 is 8-bit data in [-1, 1]. Returns, in bits per dimension, "total" (B,), "L_T" (B,), "L_t"
    (B, T - 1): the KL terms of t = 2..T in this order, and "L_0" (B,); also "mse" (B, T): the mean
    squared error of x_0_hat for t = 1..T, in x_0's units.
    """
    precise = schedule.beta.dtype
    terms, mse = [], []
    for step in range(1, schedule.T + 1):
        t = torch.full((len(x_0),), step, device=x_0.device)
        x_t = q_sample(x_0, t, torch.randn_like(x_0), schedule)
        p_mean, p_var, x_0_hat = p_mean_variance(model, x_t, t, schedule, variance, clip)
        q_mean, q_var = q_posterior(x_0, x_t, t, schedule)
        p_mean, p_var, q_mean, q_var = (a.to(precise) for a in (p_mean, p_var, q_mean, q_var))
        if step == 1:
            nats = -decoder_log_prob(x_0.to(precise), p_mean, p_var)  # L_0, Eq. (13)
        else:  # L_{t-1} of Eq. (5): the KL divergence of two Gaussians
            ratio = q_var / p_var
            nats = 0.5 * (ratio - 1 - ratio.log() + (q_mean - p_mean).square() / p_var)
        terms.append(nats.flatten(1).mean(1) / math.log(2))
        mse.append((x_0_hat - x_0).square().flatten(1).mean(1))
    alpha_bar_T, square = schedule.alpha_bar[-1], x_0.to(precise).square().flatten(1).mean(1)
    L_T = 0.5 * (alpha_bar_T * square - alpha_bar_T - (1 - alpha_bar_T).log()) / math.log(2)
    L_0, L_t = terms[0], torch.stack(terms[1:], dim=1)
    total = L_T + L_t.sum(1) + L_0  # Eq. (5)
    return {"total": total, "L_T": L_T, "L_t": L_t, "L_0": L_0, "mse": torch.stack(mse, dim=1)}


def rate_distortion(bits):
    """Table 4 from bits_per_dim's terms: rate (T,) in bits/dim and distortion (T,), an RMSE on the
    scale 0..255, by reverse time r = T - t + 1: after x_T, ..., x_t are received. L_0 is no rate.
    """
    received = torch.cat([bits["L_T"][:, None], bits["L_t"].flip(1)], dim=1)  # x_T, ..., x_1
    rate = received.mean(0).cumsum(0)  # Sec. 4.3
    return rate, bits["mse"].mean(0).flip(0).sqrt() * 127.5  # Sec. 4.3


def interpolate(model, x_0, x_0_prime, t, fractions, schedule, variance="large", clip=True):
    """Fig. 8: images between x_0 and x_0_prime, both (B, ...), mixed as x_t: list of (B, ...).

    Each image is diffused to step t once, with noise of its own that stays fixed for all fractions
    (the paper's lambda; 0: x_0, 1: x_0_prime); the mixture of both is decoded from step t on.
    """
    steps = torch.full((len(x_0),), t, device=x_0.device)
    x_t = q_sample(x_0, steps, torch.randn_like(x_0), schedule)
    x_t_prime = q_sample(x_0_prime, steps, torch.randn_like(x_0), schedule)
    mixed = [(1 - fraction) * x_t + fraction * x_t_prime for fraction in fractions]  # Sec. 4.4
    return [ddpm_sample(model, m, schedule, variance, clip, t_start=t) for m in mixed]


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
    "cifar10": dict(
        num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=(32, 32),  # App. B
        lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,  # App. B
        channels=128, channel_mult=(1, 2, 2, 2), warmup=5000, grad_clip=1.0,  # released code
        lr_decay=0.0,  # App. B
        num_samples=100, sample_batch_size=256, num_test=256,  # ours
        log_every=100, save_every=5000,  # ours
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(flip=False),  # of any images: CIFAR-10's network, 32 x 32
    # Digits are not in the paper: these are ours, sized for minutes on a laptop, an hour on a GPU.
    digits=PRESETS["cifar10"] | dict(
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(), dropout=0.0, lr=1.2e-2, batch_size=128, steps=2200, flip=False,
        warmup=900, lr_decay=3.0, num_samples=64, num_test=16, log_every=100, save_every=500,
        # Few pixels: the paper's first steps hide nothing, its last ones have nothing left to hide.
        T=250, beta_1=0.008, beta_T=0.04,  # as much noise as 1000 steps of a quarter of beta
        variance="small",  # four of five pixels are black
    ),
    mnist=PRESETS["cifar10"] | dict(
        image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
        steps=50_000, flip=False, warmup=1000,
    ),
)
PRESETS.update(fashion_mnist=PRESETS["mnist"])


def parse_args(argv=None):
    tasks = ("sample", "bpd", "progressive", "interpolate")
    parser = base_parser(__doc__.splitlines()[0], tasks)
    add = parser.add_argument
    add("--T", type=number(int, 2, 10_000), default=1000, help="steps of the process (Sec. 4)")
    add("--beta-1", type=number(float, 0, 1), default=1e-4, help="first variance (Sec. 4)")
    add("--beta-T", type=number(float, 0, 1), default=0.02, help="last variance (Sec. 4)")
    add("--objective", choices=("simple", "vlb"), default="simple", help="L_simple or L (Table 2)")
    add("--variance", choices=("large", "small"), default="large", help="sigma_t^2 (Sec. 3.2)")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="x_0_hat to [-1, 1]")
    add("--num-test", type=number(int, 2), help="test images whose bits/dim are measured")
    add("--mix-at", type=number(int, 1), help="t of --task interpolate; None: T / 2, as Fig. 8")
    return read_args(parser, PRESETS, argv, fixed=("T", "beta_1", "beta_T"))


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    schedule, mix_at = Schedule(args.T, args.beta_1, args.beta_T), args.mix_at or args.T // 2
    if mix_at > args.T:
        raise ValueError(f"--mix-at {mix_at} is beyond the last step, --T {args.T}")
    device = setup(args)
    schedule.to(device)

    def to_float(images):
        return images.to(device).float() / 127.5 - 1  # Sec. 3.3

    def to_uint8(x):
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    data = None if args.checkpoint else load_split(args, train=True)[:1]
    if data or args.task != "sample":
        test_images(args, 1)  # what is wrong with them is said now, not after the training
    net = build_unet(args, args.image_channels, args.image_channels, device)

    def model(x_t, t):
        return call(net, args, x_t, t - 1)  # published weights count from 0

    def loss_fn(images):
        return ddpm_loss(model, to_float(images), schedule, args.objective)

    def sample():
        record = []

        def draw(n):
            x_T = torch.randn(n, args.image_channels, *args.image_size, device=device)
            return to_uint8(ddpm_sample(model, x_T, *options, record=None if record else record))

        save_grid(save_images(draw, args), Path(args.out, "samples.png"), columns=8)
        steps, rows = torch.tensor(record_steps(args.T), device=device), []
        image = test_image(args)
        if image is not None:
            x_0 = to_float(image).expand(len(record), -1, -1, -1)
            t = torch.cat([steps.new_zeros(1), steps])
            rows.append(q_sample(x_0, t, torch.randn_like(x_0), schedule))
        for x_t in torch.stack(record, dim=1)[:4]:  # (16, C, H, W): at the recorded steps, and x_0
            x_0_hat = p_mean_variance(model, x_t[:-1], steps.flip(0), *options)[2]
            rows += [x_t, torch.cat([x_0_hat, x_t[-1:]])]
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "process.png"), columns=len(record))
        return {"n": args.num_samples, "sampler": "Alg. 2"}

    def bound():
        args.bf16 = False
        batches = to_float(test_images(args, args.num_test)[0]).split(args.sample_batch_size)
        parts = [bits_per_dim(model, x_0, *options) for x_0 in batches]
        return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}

    def bpd():
        bits = bound()
        bits["L_t"] = bits["L_t"].sum(1)
        mean = {key: bits[key].mean().item() for key in ("total", "L_T", "L_t", "L_0")}
        n = len(bits["total"])
        mean["standard_error"] = bits["total"].std().item() / math.sqrt(n)
        report("test bits/dim <= {total:.4f} +- {standard_error:.4f}, of which L_T {L_T:.6f}, "
               "L_1 to L_T-1 {L_t:.4f}, L_0 {L_0:.4f}; n = ".format(**mean) + str(n), last=True)
        return {"n": n, "split": "test", "bits_per_dim": mean}

    def progressive():
        bits = bound()
        rate, rmse = rate_distortion(bits)
        table = []
        for r in sorted({-(-args.T * k // 10) for k in range(1, 11)}, reverse=True):  # Table 4
            table.append((r, rate[r - 1].item(), rmse[r - 1].item()))
            report("{:5d} steps: rate {:.5f} bits/dim, RMSE {:.5f}".format(*table[-1]), last=True)
        return {"n": len(bits["total"]), "split": "test", "steps_rate_rmse": table}

    def interpolation():
        pairs = to_float(test_images(args, 16)[0])
        x_0, x_0_prime = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :][: len(pairs) // 2]
        mixed = interpolate(model, x_0, x_0_prime, mix_at, [k / 10 for k in range(11)], *options)
        rows = torch.stack([x_0, *mixed, x_0_prime], dim=1)  # (8, 13, C, H, W)
        save_grid(to_uint8(rows.flatten(0, 1)), Path(args.out, "interpolation.png"), columns=13)
        return {"n": len(x_0), "split": "test", "t": mix_at}

    options = (schedule, args.variance, args.clip)
    tasks = {"sample": sample, "bpd": bpd, "progressive": progressive, "interpolate": interpolation}
    run(args, tasks, net, loss_fn, data, also=("bpd",), variance=args.variance, clip=args.clip,
        evaluations=args.T)


if __name__ == "__main__":
    main()
