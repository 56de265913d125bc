"""Denoising Diffusion Implicit Models (Song, Meng, Ermon 2021, arXiv:2010.02502).

Implements: Eq. (4), (5), (9), (12), (13), (16); Table 1, 2; Fig. 5, 6.

    t, s            a step goes from t to s; in sampling s < t     ints in 0..T; 0 is the data
    tau             the steps that a sampler visits                S ascending ints, the last T
    x_0, x_t        data, and data after t steps of noise          (B, C, H, W), x_0 in [-1, 1]
    alpha_bar       the paper's alpha: DDPM's product of 1 - beta  (T + 1,), alpha_bar[0] = 1
    sigma, eta      noise of a step; eta: 0 is DDIM, 1 is DDPM     eta in [0, 1]
    model(x_t, t)   the network eps_theta, fed t - 1               t (B,) int64; like x_t

    python ddim.py                                                train, 20-step samples
    python ddim.py --checkpoint runs/ddpm-digits/checkpoint.pt    use what ddpm.py trained
    python ddim.py --checkpoint runs/ddpm-digits/checkpoint.pt --task sweep    or reconstruct,
                                                                                  interpolate

Measured results stand in README.md. Deviations from the paper and the released code:
1. tau has S distinct steps and ends at T; the released lists have other counts, repeat steps and
   end between 0.8 T and 0.99 T. Encoding starts with eps at t = 1: the network knows no t = 0.
2. Training is DDPM's, whose weights gave the published CIFAR-10 numbers: means over dimensions,
   warmup, gradient clipping, independent t; EMA decay min(decay, (1 + n) / (10 + n)).
3. The sigma-hat row of Table 1 clips x_0_hat to [-1, 1], as released; all others do not.
4. The bundled digits, which are not in the paper, have T = 250, beta from 0.008 to 0.04.
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


def ddim_loss(model, x_0, schedule):
    """Scalar: mean over the batch and all dimensions; x_0 in [-1, 1].

    It knows the marginals q(x_t | x_0) alone, which the processes of all sigma share: one network
    serves them all, and DDPM's network is one of these (Theorem 1).
    """
    t = torch.randint(1, schedule.T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    error = (model(q_sample(x_0, t, eps, schedule), t) - eps).square()
    return error.mean()  # Eq. (5) with gamma = 1


def timesteps(T, S, spacing="linear"):
    """tau: S distinct ascending ints of 1..T, the last T (Sec. 4.2, App. D.2). ValueError if S > T.

    "linear": T i / S; "quadratic": T (i / S)^2, but at least i; rounded down, for i = 1..S.
    """
    if not 1 <= S <= T:
        raise ValueError(f"{S} steps are not within 1..{T}")
    if spacing == "linear":
        return [T * i // S for i in range(1, S + 1)]
    if spacing == "quadratic":
        return [max(i, T * i * i // S**2) for i in range(1, S + 1)]
    raise ValueError(f"spacing is {spacing!r}, not 'linear' or 'quadratic'")


def sigma_tensor(t, s, eta, schedule):
    """ddim_sigma as a 0-dimensional tensor where the schedule is."""
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    return eta * variance.sqrt()  # Eq. (16)


def ddim_sigma(t, s, eta, schedule):
    """The standard deviation of the step from t to s < t, a float; 0 at s = 0, the data."""
    return float(sigma_tensor(t, s, eta, schedule))


def ddim_step(x_t, eps, t, s, schedule, eta=0.0, noise=None, clip=False):
    """x_s, like x_t, with eps = model(x_t, t); ints t and s. ValueError unless eta is in [0, 1].

    noise ~ N(0, I) is drawn if None. clip: x_0_hat to [-1, 1], and eps derived again from it. With
    eta = 0, and only then, s > t makes the same step towards the noise.
    """
    if not 0 <= eta <= 1 or (eta > 0 and s > t):
        raise ValueError(f"eta is {eta} from t = {t} to {s}: not in [0, 1], or 0 where s > t")
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    signal, spread = alpha_bar_t.sqrt().to(x_t.dtype), (1 - alpha_bar_t).sqrt().to(x_t.dtype)
    x_0_hat = (x_t - spread * eps) / signal  # Eq. (9)
    if clip:
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps = (x_t - signal * x_0_hat) / spread  # Eq. (9) solved for eps
    sigma = sigma_tensor(t, s, eta, schedule) if eta > 0 else torch.zeros_like(alpha_bar_t)
    direction = (1 - alpha_bar_s - sigma**2).clamp(min=0).sqrt().to(x_t.dtype)
    mean = alpha_bar_s.sqrt().to(x_t.dtype) * x_0_hat + direction * eps  # Eq. (12)
    if eta == 0:
        return mean
    noise = torch.randn_like(x_t) if noise is None else noise
    return mean + sigma.to(x_t.dtype) * noise  # Eq. (12)


def record_steps(T):
    """The at most 15 evenly spaced steps of 1..T whose states a sampler records, ascending."""
    return sorted({-(-T * k // 15) for k in range(1, 16)})


@torch.no_grad()
def ddim_sample(model, x_T, schedule, tau, eta=0.0, clip=False, sigma_hat=False, record=None):
    """x_T ~ N(0, I) -> x_0, like x_T, in len(tau) evaluations of the model; tau from `timesteps`.

    eta (Table 1, Fig. 5) 0: DDIM, deterministic; 1: DDPM's sampler, at tau = 1..T that with the
    small variance.
    sigma_hat: the mean of eta = 1, the larger noise of DDPM's other variance (App. D.3).
    record: a list that gets x_t at 15 of tau's steps, from T down (all, if fewer), and x_0.
    """
    x_t, recorded = x_T, () if record is None else record_steps(len(tau))
    for i in range(len(tau), 0, -1):
        t, s = tau[i - 1], tau[i - 2] if i > 1 else 0
        if i in recorded:
            record.append(x_t)
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        if sigma_hat:
            no_noise = torch.zeros_like(x_t)
            x_t = ddim_step(x_t, eps, t, s, schedule, 1.0, no_noise, clip)
            if s > 0:
                hat = (1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]).sqrt()  # App. D.3
                x_t = x_t + hat.to(x_t.dtype) * torch.randn_like(x_t)
        else:
            x_t = ddim_step(x_t, eps, t, s, schedule, eta, clip=clip)
    if record is not None:
        record.append(x_t)
    return x_t


@torch.no_grad()
def ddim_encode(model, x_0, schedule, tau):
    """x_0 -> x_T, like x_0: the ODE that DDIM discretises, integrated upwards (Sec. 4.3).

    Each Euler step from s to the next t of tau takes eps at its start, (x_s, s), where the model
    knows no s = 0 and gets 1. len(tau) evaluations; ddim_sample with eta = 0 decodes (Table 2).
    """
    x_s, s = x_0, 0
    for t in tau:
        eps = model(x_s, torch.full((len(x_s),), max(s, 1), device=x_s.device))
        x_s, s = ddim_step(x_s, eps, s, t, schedule), t  # Eq. (13)
    return x_s


def slerp(z_0, z_1, fraction):
    """Spherical interpolation, like z_0: z_0 at fraction 0, z_1 at 1 (App. D.5).

    The angle is taken image by image over all dimensions; at 0 or pi they mix linearly. Fig. 6.
    """
    a, b = z_0.flatten(1), z_1.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = cosine.clamp(-1, 1).arccos()[:, None]  # (B, 1)
    linear = theta.sin() < 1e-4
    sine = torch.where(linear, torch.ones_like(theta), theta.sin())
    of_a = torch.where(linear, 1 - fraction, ((1 - fraction) * theta).sin() / sine)
    of_b = torch.where(linear, fraction, (fraction * theta).sin() / sine)
    return (of_a * a + of_b * b).view_as(z_0)  # App. D.5


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
        # Network and training are DDPM's: Ho et al. 2020, App. B, and the released code for line 3.
        num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=(32, 32),
        lr=2e-4, batch_size=128, ema_decay=0.9999, steps=800_000, flip=True,
        channels=128, channel_mult=(1, 2, 2, 2), warmup=5000, grad_clip=1.0, lr_decay=0.0,
        spacing="quadratic", num_steps=100,  # App. D.2; Table 1
        num_samples=100, sample_batch_size=256, num_test=64, log_every=100, save_every=5000,  # ours
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(flip=False, spacing="linear"),  # App. D.2
    # Digits are not in the paper: these are ours, sized for minutes on a laptop, an hour on a GPU.
    digits=PRESETS["cifar10"] | dict(
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(), dropout=0.0, lr=1.2e-2, batch_size=128, steps=2200, flip=False,
        warmup=900, lr_decay=3.0, num_samples=64, num_test=16, log_every=100, save_every=500,
        # Few pixels: the paper's first steps hide nothing, its last ones have nothing left to hide.
        T=250, beta_1=0.008, beta_T=0.04,  # as much noise as 1000 steps of a quarter of beta
        spacing="linear", num_steps=20,
    ),
    mnist=PRESETS["cifar10"] | dict(
        image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
        steps=50_000, flip=False, warmup=1000,
        spacing="linear", num_steps=50,
    ),
)
PRESETS.update(fashion_mnist=PRESETS["mnist"])


def parse_args(argv=None):
    tasks = ("sample", "sweep", "reconstruct", "interpolate")
    parser = base_parser(__doc__.splitlines()[0], tasks)
    add = parser.add_argument
    add("--T", type=number(int, 2, 10_000), default=1000, help="steps of the process (Sec. 5)")
    add("--beta-1", type=number(float, 0, 1), default=1e-4, help="first variance (DDPM, Sec. 4)")
    add("--beta-T", type=number(float, 0, 1), default=0.02, help="last variance (DDPM, Sec. 4)")
    add("--num-steps", type=number(int, 1), help="S, network evaluations of a sample (Table 1)")
    add("--eta", type=number(float, 0, 1), default=0.0, help="0: DDIM, 1: DDPM (Eq. 16)")
    add("--sigma-hat", action="store_true", help="DDPM's larger noise instead of eta (App. D.3)")
    add("--spacing", choices=("linear", "quadratic"), help="of the steps visited (App. D.2)")
    add("--clip", action=argparse.BooleanOptionalAction, default=False, help="x_0_hat to [-1, 1]")
    add("--num-test", type=number(int, 2), help="test images to reconstruct")
    schedule = ("T", "beta_1", "beta_T")
    args = read_args(parser, PRESETS, argv, methods=(SCRIPT, "ddpm"), fixed=schedule)
    if args.task in ("sample", "interpolate") and args.num_steps > args.T:
        fail(f"--num-steps {args.num_steps} is more than the {args.T} steps of the process")
    return args


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    schedule = Schedule(args.T, args.beta_1, args.beta_T)
    tau = timesteps(args.T, min(args.num_steps, args.T), args.spacing)
    device = setup(args)
    schedule.to(device)

    def to_float(images):
        return images.to(device).float() / 127.5 - 1

    def to_uint8(x):
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    data = None if args.checkpoint else load_split(args, train=True)[:1]
    if data or args.task == "reconstruct":
        test_images(args, 1)  # what is wrong with them is said now, not after the training
    net = build_unet(args, args.image_channels, args.image_channels, device)

    def model(x_t, t):
        return call(net, args, x_t, t - 1)  # published weights count from 0

    def loss_fn(images):
        return ddim_loss(model, to_float(images), schedule)

    def latents(n):
        return torch.randn(n, args.image_channels, *args.image_size, device=device)

    def sample():
        record, clip = [], args.clip or args.sigma_hat  # as released

        def draw(n):
            options = {"clip": clip, "sigma_hat": args.sigma_hat}
            options["record"] = None if record else record
            return to_uint8(ddim_sample(model, latents(n), schedule, tau, args.eta, **options))

        save_grid(save_images(draw, args), Path(args.out, "samples.png"), columns=10)
        rows = list(torch.stack(record, dim=1)[:8])  # (S + 1 or 16, C, H, W) each
        image = test_image(args)
        if image is not None:
            x_0 = to_float(image).expand(len(record), -1, -1, -1)
            t = torch.tensor([0, *(tau[i - 1] for i in record_steps(len(tau)))], device=device)
            rows.insert(0, q_sample(x_0, t, torch.randn_like(x_0), schedule))
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "process.png"), columns=len(record))
        return {"n": args.num_samples, "evaluations": len(tau), "spacing": args.spacing,
                "eta": "sigma-hat" if args.sigma_hat else args.eta, "clip": clip}

    def sweep():
        x_T, rows, table = latents(10), [], []
        model(x_T, torch.ones(len(x_T), device=device))  # what the first call costs is not measured
        for eta in (0.0, 0.2, 0.5, 1.0, "sigma-hat"):  # Table 1
            for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, 1000)}):
                hat, start = eta == "sigma-hat", time.time()
                torch.manual_seed(args.seed + 1)  # in each row the same noise, and not x_T
                x_0 = ddim_sample(model, x_T, schedule, timesteps(args.T, S, args.spacing),
                                  1.0 if hat else eta, args.clip or hat, hat)
                rows.append(to_uint8(x_0).cpu())  # waits for the GPU
                table.append({"eta": eta, "S": S, "seconds": round(time.time() - start, 2)})
                report("eta {eta}: {S} evaluations, {seconds} s".format(**table[-1]), last=True)
        labels = ["eta {eta}, {S} evaluations, {seconds} s".format(**row) for row in table]
        save_grid(torch.cat(rows), Path(args.out, "sweep.png"), columns=10, labels=labels)
        return {"n": len(x_T), "spacing": args.spacing, "clip": args.clip, "table": table}

    def reconstruct():
        args.bf16 = False
        x_0, table = to_float(test_images(args, args.num_test)[0]), []
        rows = [to_uint8(x_0[:10])]
        for S in sorted({min(S, args.T) for S in (10, 20, 50, 100, 200, 500, 1000)}):  # Table 2
            steps, parts = timesteps(args.T, S, args.spacing), []
            for x in x_0.split(args.sample_batch_size):
                x_T = ddim_encode(model, x, schedule, steps)
                parts.append(ddim_sample(model, x_T, schedule, steps))
            decoded = torch.cat(parts)
            error = ((decoded - x_0) / 2).square().flatten(1).mean(1)  # data in [0, 1]
            table.append({"S": S, "mse": error.mean().item(),
                          "standard_error": error.std().item() / math.sqrt(len(error))})
            report("S = {S}: {mse:.6f} +- {standard_error:.6f}".format(**table[-1]), last=True)
            rows.append(to_uint8(decoded[:10]))
        labels = ["originals", *(f"S = {row['S']}, MSE {row['mse']:.5f}" for row in table)]
        path = Path(args.out, "reconstruct.png")
        save_grid(torch.cat(rows), path, columns=len(rows[0]), labels=labels)
        return {"n": len(x_0), "split": "test", "spacing": args.spacing, "table": table}

    def interpolate():
        a, b, c, d = latents(4).split(1)
        line = [k / 7 for k in range(8)]
        edges = [(slerp(a, b, down), slerp(c, d, down)) for down in line]
        x_T = torch.cat([slerp(left, right, across) for left, right in edges for across in line])
        x_0 = torch.cat([ddim_sample(model, part, schedule, tau, clip=args.clip)
                         for part in x_T.split(args.sample_batch_size)])
        save_grid(to_uint8(x_0), Path(args.out, "interpolation.png"), columns=8)
        return {"n": len(x_0), "evaluations": len(tau), "spacing": args.spacing}

    tasks = {f.__name__: f for f in (sample, sweep, reconstruct, interpolate)}
    run(args, tasks, net, loss_fn, data)


if __name__ == "__main__":
    main()
