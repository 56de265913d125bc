"""Sliced score matching (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088), and the noise-conditional
networks that NCSN (Song, Ermon 2019, arXiv:1907.05600) trains with it.

Implements, in the order and with the numbers of NCSN, Sec. 2 to 4, which restates the objectives:
Eq. (1), (2), (3), (4), (6); Alg. 1; Fig. 2.

    x               data; images: 8 bits scaled linearly to [0, 1]  (B, ...), d numbers each
    s, score(x)     the model of grad log p(x), gradient by x       like x
    v               random projection, E[v v^T] = I                 like x
    z               noise of the data, of each Langevin step        like x, N(0, I)
    sigmas          noise levels sigma_1 > ... > sigma_L            (L,) float64, with one ratio
    score(x, sigma) the score of the data with noise, sigma (B,)    like x

    python sliced_sm.py                                             train on digits, sample
    python sliced_sm.py --dataset gmm --objective ssm               Fig. 2; or sm, ssm-vr, dsm
    python sliced_sm.py --dataset checkerboard
    python sliced_sm.py --levels 1 --data-noise 0.01                Fig. 1, and without the noise
    python sliced_sm.py --checkpoint runs/sliced_sm-digits/checkpoint.pt --task cost

Measured results stand in README.md. Deviations from NCSN's training by sliced score matching:
1. The network is DDPM's U-Net, fed 2 x - 1 and the level's index; score = its output / sigma.
2. The loss is divided by d: with gradient clipping the scale matters.
3. EMA decay min(decay, (1 + n) / (10 + n)) after n steps: the initial weights leave early.
4. Rademacher projections, SSM's default; NCSN's code draws Gaussian ones.
5. Images are not dequantised.
6. On digits sigma falls from 3 to 0.1, not from 1 to 0.01, and the sequel's denoising ends the run.
"""

import math

import torch

# ---- The method ----------------------------------------------------------------------------------


def exact_score_matching(score, x):
    """Score matching (Hyvarinen 2005): tr(grad s) + 1/2 |s|^2, (B,), for x (B, ...).

    One back-propagation for each of the d dimensions. Here and below each row of s depends on its
    own row of x alone, so that the sum over the batch can be differentiated at once.
    """
    x = x.detach().requires_grad_()
    s = score(x)
    trace = 0
    for i, s_i in enumerate(s.flatten(1).unbind(1)):  # each (B,)
        (grad,) = torch.autograd.grad(s_i.sum(), x, create_graph=True)  # of s_i by x
        trace = trace + grad.flatten(1)[:, i]
    return trace + 0.5 * s.square().flatten(1).sum(1)  # Eq. (1)


def denoising_score_matching(score, x, sigma):
    """1/2 |s(x_tilde) + z / sigma|^2 at x_tilde = x + sigma z, (B,), for x (B, ...): it matches the
    score of the data with noise. sigma: a number, or a tensor that broadcasts against x.
    """
    z = torch.randn_like(x)
    return 0.5 * (score(x + sigma * z) + z / sigma).square().flatten(1).sum(1)  # Eq. (2)


def random_projection(x, kind):
    """v like x (B, ...) with E[v v^T] = I, of kind "rademacher", "gaussian" or "sphere".

    The sphere's radius is sqrt(d); "rademacher", random signs, is exact for a diagonal Jacobian.
    """
    if kind == "rademacher":
        return 2 * torch.randint_like(x, 2) - 1
    v = torch.randn_like(x)
    if kind == "gaussian":
        return v
    if kind == "sphere":
        length = v.flatten(1).norm(dim=1)  # (B,)
        return v * expand(math.sqrt(x[0].numel()) / length, x)
    raise ValueError(f"projection is {kind!r}, not 'rademacher', 'gaussian' or 'sphere'")


def sliced_score_matching(score, x, n_projections=1, projection="rademacher",
                          variance_reduced=True):
    """v^T grad(v^T s) + 1/2 (v^T s)^2, the mean of n_projections draws of v: (B,), for x (B, ...).

    One back-propagation for each projection, whatever d. variance_reduced: 1/2 |s|^2, which is the
    expectation of 1/2 (v^T s)^2, in its place (SSM-VR). ValueError: n_projections < 1.
    """
    if n_projections < 1:
        raise ValueError(f"n_projections is {n_projections}, not at least 1")
    x = x.detach().requires_grad_()
    s = score(x)
    loss = 0
    for _ in range(n_projections):
        v = random_projection(x, projection)
        slices = (v * s).flatten(1).sum(1)  # v^T s, (B,)
        (grad,) = torch.autograd.grad(slices.sum(), x, create_graph=True)  # of v^T s by x
        square = s.square().flatten(1).sum(1) if variance_reduced else slices.square()
        loss = loss + (v * grad).flatten(1).sum(1) + 0.5 * square  # Eq. (3)
    return loss / n_projections


def noisy_score_matching(score, x, sigma, objective="ssm-vr", n_projections=1,
                         projection="rademacher"):
    """An objective, (B,), for the score of x (B, ...) with noise sigma z; of x itself at sigma 0.

    objective: "sm" Eq. (1); "ssm", "ssm-vr" Eq. (3) without and with reduced variance; "dsm"
    Eq. (2), which needs noise. sigma: as of denoising_score_matching. ValueError: another one, or
    "dsm" at sigma 0.
    """
    if objective == "dsm":
        if isinstance(sigma, (int, float)) and sigma <= 0:
            raise ValueError(f"sigma is {sigma}: 'dsm' needs noise")
        return denoising_score_matching(score, x, sigma)
    x_tilde = x + sigma * torch.randn_like(x)  # where the score is differentiated
    if objective == "sm":
        return exact_score_matching(score, x_tilde)
    if objective not in ("ssm", "ssm-vr"):
        raise ValueError(f"objective is {objective!r}, not 'sm', 'ssm', 'ssm-vr' or 'dsm'")
    vr = objective == "ssm-vr"
    return sliced_score_matching(score, x_tilde, n_projections, projection, vr)


def noise_conditional_loss(score, x, sigmas, objective="ssm-vr", n_projections=1,
                           projection="rademacher"):
    """noisy_score_matching at a random level for each image, weighted by lambda = sigma^2: scalar,
    the mean over the batch. x (B, ...), score(x, sigma), sigmas (L,).
    """
    sigma = sigmas[torch.randint(len(sigmas), (len(x),), device=x.device)].to(x.dtype)  # (B,)
    loss = noisy_score_matching(lambda x: score(x, sigma), x, expand(sigma, x), objective,
                                n_projections, projection)
    return (sigma.square() * loss).mean()  # Eq. (6)


def expand(a, x):
    """a (B,) -> (B, 1, ..., 1) in x's dtype, to multiply x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


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


# The toy data: Fig. 2's 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), and a checkerboard


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


def checkerboard_sample(n):
    """n draws (n, 2), uniform on the 8 dark squares, of side 2, of a board on [-4, 4]^2."""
    row, half = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([2 * half + row % 2, row], dim=1)  # column and row of the square
    return 2 * (corner + torch.rand(n, 2)) - 4


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
    "cifar10": dict(  # NCSN, Sec. 5 and its appendix
        sigma_max=1.0, sigma_min=0.01, levels=10, T=100, eps=2e-5, lr=1e-3, batch_size=128,
        steps=200_000, flip=True, ema_decay=0.0,
        data_noise=0.0, denoise=False, num_projections=1,  # NCSN's code
        image_size=(32, 32), channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,  # DDPM's
        attention_resolutions=(16,), dropout=0.0, warmup=0, grad_clip=0.0, lr_decay=0.0,
        num_samples=100, sample_batch_size=256, num_test=500,  # ours
        log_every=100, save_every=5000,  # ours
    ),
}
PRESETS.update(
    folder=PRESETS["cifar10"] | dict(flip=False),
    # Digits are not in the papers at this size: these are ours, sized for minutes on a laptop.
    digits=PRESETS["cifar10"] | dict(
        sigma_max=3.0, sigma_min=0.1, levels=32, T=20, eps=0.002, denoise=True, ema_decay=0.999,
        image_size=(16, 16), channels=16, channel_mult=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(8,), lr=4e-3, batch_size=64, steps=1000, warmup=150, lr_decay=1.0,
        grad_clip=1.0, flip=False, log_every=50, save_every=250,
    ),
    mnist=PRESETS["cifar10"] | dict(
        image_size=(28, 28), channels=64, channel_mult=(1, 2, 2), attention_resolutions=(14,),
        flip=False,
    ),
    gmm=PRESETS["cifar10"] | dict(  # NCSN, Fig. 2, 3 and their appendix; channels: the MLP's
        levels=1, sigma_min=1.0, T=1000, eps=0.1, steps=10_000, num_samples=1280, flip=False,
        ema_decay=0.999,  # ours: Adam's last weights are a noisy end
    ),
)
PRESETS.update(
    fashion_mnist=PRESETS["mnist"],
    # ours: the density of a board with sharp edges has no score there
    checkerboard=PRESETS["gmm"] | dict(data_noise=0.2, eps=0.01),
)
for name in ("cifar10", "folder", "digits", "mnist", "fashion_mnist"):  # NCSN, Fig. 1
    PRESETS[f"{name} --levels 1"] = dict(sigma_min=0.01, T=1000, eps=2e-5, denoise=False) | (
        dict(steps=50_000) if name != "digits" else {})
PRESETS["gmm --objective dsm"] = dict(data_noise=0.3)  # ours: it needs noise
TOYS = {"gmm": gmm_sample, "checkerboard": checkerboard_sample}


def parse_args(argv=None):
    parser = base_parser(__doc__.splitlines()[0], ("sample", "test", "cost"))
    add, positive = parser.add_argument, number(float, 1e-12)
    objectives, kinds = ("sm", "ssm", "ssm-vr", "dsm"), ("rademacher", "gaussian", "sphere")
    add("--objective", choices=objectives, default="ssm-vr", help="exact, sliced or denoising")
    add("--num-projections", type=number(int, 1), help="projections of each image")
    add("--projection", choices=kinds, default="rademacher", help="distribution of projections")
    add("--sigma-max", type=positive, help="sigma_1")
    add("--sigma-min", type=positive, help="sigma_L")
    add("--levels", type=number(int, 1), help="L; 1: not noise-conditional, and plain Langevin")
    add("--data-noise", type=number(float, 0), help="noise of the data, with one level (Fig. 1)")
    add("--T", type=number(int, 1), help="Langevin steps at each level (Alg. 1)")
    add("--eps", type=positive, help="step size of Alg. 1")
    flag = argparse.BooleanOptionalAction
    add("--denoise", action=flag, help="end with the mean of the data given the last sample")
    add("--num-test", type=number(int, 1), help="test images of --task test")
    fixed = ("sigma_max", "sigma_min", "levels")
    args = read_args(parser, PRESETS, argv, fixed=fixed, variants=("objective", "levels"))
    if args.loaded and (args.loaded["args"]["dataset"] in TOYS) != (args.dataset in TOYS):
        fail(f"--dataset {args.dataset}: the checkpoint's is {args.loaded['args']['dataset']}, and "
             "points have another network than images")
    if args.dataset in TOYS and args.flip:
        fail("--flip mirrors images, not points")
    if args.dataset in TOYS and (args.task != "sample" or args.levels > 1):
        fail(f"--dataset {args.dataset} takes --task sample and --levels 1")
    if args.levels > 1 and args.data_noise > 0:
        fail("--data-noise takes --levels 1: the levels are noise of the data already")
    if args.levels == 1 and args.task == "test":
        fail("--task test is for noise levels, and --levels 1 has none")
    if args.levels == 1 and args.objective == "dsm" and not args.data_noise:
        fail("--objective dsm needs noise: with --levels 1 add --data-noise 0.01")
    twice = not args.checkpoint and args.objective != "dsm"
    if args.compile and (twice or args.task == "cost"):
        what = f"--objective {args.objective}" if twice else "--task cost"
        fail(f"{what} differentiates twice, which --compile cannot")
    return args


def mlp(d, width):
    """The toys' score network (NCSN's appendix): d -> width -> width -> d, with softplus."""
    middle = (nn.Softplus(), nn.Linear(width, width), nn.Softplus())
    return nn.Sequential(nn.Linear(d, width), *middle, nn.Linear(width, d))


def histogram(x, title, extent=10):
    """Points (N, 2) in a square of [-extent, extent]^2, y upwards, as an image (1, 324, 324)."""
    edges = np.linspace(-extent, extent, 82)
    counts = np.histogram2d(x[:, 1].cpu().numpy(), x[:, 0].cpu().numpy(), (edges, edges))[0][::-1]
    shade = 255 * (1 - np.sqrt(counts / max(1, counts.max())))
    picture = Image.fromarray(shade.astype(np.uint8)).resize((324, 324), Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def arrows(x, scores, title, extent=10):
    """scores, each (N, 2), as lines from the points x (N, 2) in histogram's square: the last one
    thin and black, one before it thick and grey. |s| = 1 is a line of length 1/2, infinity of 1.
    """
    picture = Image.new("L", (324, 324), 255)
    draw, styles = ImageDraw.Draw(picture), ((190, 5), (0, 1))
    for s, (shade, width) in zip(scores, styles[-len(scores):], strict=True):
        lines = torch.cat([x, x + s / (1 + s.norm(dim=1, keepdim=True))], dim=1)  # x, y, x, y
        for line in (162 * (1 + lines / extent * lines.new_tensor([1, -1, 1, -1]))).tolist():
            draw.line(line, shade, width)
            draw.circle(line[:2], (width + 1) / 2, shade)
    draw.text((6, 6), title, fill=0)
    return pil_to_tensor(picture)


def twice_differentiable(objective):
    """The fused attention has no second derivative; "dsm" needs none and keeps it."""
    backend = nn.attention.SDPBackend.MATH
    return contextlib.nullcontext() if objective == "dsm" else nn.attention.sdpa_kernel(backend)


def seconds(net, score, x, objective):
    """Best of three times of the gradient of net's weights for one batch x; one more warms up."""
    best = math.inf
    for repeat in range(4):
        since = time.time()
        with twice_differentiable(objective):
            noisy_score_matching(score, x, 0.1, objective).mean().backward()
        sum(p.grad.sum() for p in net.parameters()).item()  # waits for a GPU
        net.zero_grad()
        best = min(best, time.time() - since) if repeat else best
    return best


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    sigmas = geometric_sigmas(args.sigma_max, args.sigma_min, args.levels)
    device, toy = setup(args), args.dataset in TOYS
    sigmas = sigmas.to(device, torch.float32 if device.type == "mps" else torch.float64)
    options = (args.objective, args.num_projections, args.projection)

    def to_float(images):
        return images.to(device).float() / 255

    def to_uint8(x):
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)

    data = None
    if not args.checkpoint:
        data = (TOYS[args.dataset](100_000),) if toy else load_split(args, train=True)[:1]
    if not toy and (data or args.task == "test"):
        test_images(args, 1)  # what is wrong with them is said now, not after the training

    def score(x, sigma):
        if toy:
            return net(x)
        level = (sigmas.to(sigma.dtype) - sigma[:, None]).abs().argmin(1)
        return call(net, args, 2 * x - 1, level) / expand(sigma, x)

    def one_level(x):  # sigma only scales the output: the data's noise is --data-noise
        return score(x, sigmas[0].to(x.dtype).expand(len(x)))

    def loss_fn(batch):
        x = batch if toy else to_float(batch)
        with twice_differentiable(args.objective):
            if args.levels > 1:
                loss = noise_conditional_loss(score, x, sigmas, *options)
            else:
                loss = noisy_score_matching(one_level, x, args.data_noise, *options).mean()
                loss = args.sigma_min**2 * loss  # Eq. (6)'s weight
        return loss / x[0].numel()

    def sample():
        record = []

        def draw(n):
            x = torch.rand(n, args.image_channels, *args.image_size, device=device)  # U[0, 1]
            chain = (score, x, sigmas, args.eps, args.T, args.denoise)
            if record:
                return to_uint8(annealed_langevin(*chain))
            record.append(x)
            return to_uint8(annealed_langevin(*chain, record))

        save_grid(save_images(draw, args), Path(args.out, "samples.png"), columns=10)
        rows, image = [*torch.stack(record, dim=1)[:8]], test_image(args)
        if image is not None:  # the image with the noise of each recorded state
            steps = [1, *record_steps(args.levels * args.T)]
            sigma = torch.stack([sigmas[(step - 1) // args.T] for step in steps])
            sigma = torch.cat([sigma, sigma.new_zeros(int(args.denoise))])  # then none
            x = to_float(image).expand(len(record), -1, -1, -1)
            rows.insert(0, x + expand(sigma, x) * torch.randn_like(x))
        save_grid(to_uint8(torch.cat(rows)), Path(args.out, "process.png"), columns=len(record))
        return {"n": args.num_samples, "evaluations": args.levels * args.T + args.denoise}

    def test():
        """The yardstick: denoising score matching, whatever the network was trained by."""
        args.bf16 = False
        images, losses = to_float(test_images(args, args.num_test)[0]), []
        for sigma in sigmas:
            parts = [noise_conditional_loss(score, x, sigma[None], "dsm") * len(x)
                     for x in images.split(args.sample_batch_size)]
            losses.append(sum(parts).item() / images.numel())
        report(f"denoising loss per dimension of {len(images)} test images: "
               f"{sum(losses) / len(losses):.4f}, from {losses[0]:.4f} at sigma_1 to "
               f"{losses[-1]:.4f} at sigma_L; 0.5 by a score of 0", last=True)
        return {"n": len(images), "split": "test", "dsm_loss": losses}

    def fluctuation():
        lines = Path(args.out, "log.jsonl").read_text().splitlines()
        losses = torch.tensor([json.loads(line)["loss"] or 0.0 for line in lines])
        losses = losses[len(losses) // 2 :]
        mean, std = losses.mean().item(), losses.std(correction=0).item()
        report(f"the training's second half: {len(losses)} lines of the log with losses of "
               f"{mean:.4f} +- {std:.4f}", last=True)
        return {"n": len(losses), "loss_mean": mean, "loss_std": std}

    def cost():
        x = torch.rand(args.batch_size, args.image_channels, *args.image_size, device=device)
        net.requires_grad_(True)
        unet = {name: seconds(net, one_level, x, name) for name in ("dsm", "ssm", "ssm-vr")}
        ratio = unet["ssm-vr"] / unet["dsm"]
        report(f"U-Net, {len(x)} images: a step takes {unet['dsm']:.3f} s by dsm, {ratio:.2f} "
               "times as long by ssm-vr", last=True)
        table = []
        for d in (4, 16, 64):
            small, x = mlp(d, 128).to(device), torch.randn(128, d, device=device)
            row = {name: seconds(small, small, x, name) for name in ("dsm", "ssm", "ssm-vr", "sm")}
            table.append({"d": d, **row})
            times = ", ".join(f"{1000 * row[name]:.1f} by {name}" for name in row)
            report(f"MLP, 128 points of {d} dimensions, milliseconds: {times}", last=True)
        return {"batch_size": args.batch_size, "unet_seconds": unet, "mlp_seconds": table}

    def square(n):  # n^2 points of [-8, 8]^2, where the chains start
        line = torch.linspace(-8, 8, n, device=device)
        return torch.cartesian_prod(line, line)

    def exact_score(x):
        return gmm_score(x, x.new_full((len(x),), args.data_noise))

    def score_error():
        """Of gmm, inside the discs of radius 3 around the modes, 99% of the data, and outside."""
        x, measured = square(161), {}
        near = torch.minimum((x - 5).norm(dim=1), (x + 5).norm(dim=1)) <= 3
        for name, where in (("inside", near), ("outside", ~near)):
            exact = exact_score(x[where])
            error = (net(x[where]) - exact).square().sum(1).mean().item()
            share = error / exact.square().sum(1).mean().item()
            measured[name] = {"mean_squared_error": error, "of_mean_square": share}
            report(f"score {name} the high-density region: mean squared error {error:.4f}, "
                   f"{share:.1%} of the score's mean square", last=True)
        return measured

    def toy_sample():
        noise = args.data_noise * torch.randn(args.num_samples, 2)
        x, points = TOYS[args.dataset](args.num_samples) + noise, square(17)
        scores, title, measured = [net(points).cpu()], "learned score", {}
        if args.dataset == "gmm":
            scores, title = [exact_score(points).cpu(), *scores], "learned score; grey: exact"
            measured = score_error()
        start = 16 * torch.rand(args.num_samples, 2, device=device) - 8  # U[-8, 8]^2
        chains = langevin(net, start, args.eps, args.T)
        pictures = [histogram(x, "data"), arrows(points.cpu(), scores, title),
                    histogram(chains, "Langevin dynamics")]
        save_grid(torch.stack(pictures), Path(args.out, f"{args.dataset}.png"), columns=3)
        return {"n": len(chains), "evaluations": args.T, **measured}

    if toy:
        net, tasks, also = mlp(2, args.channels), {"sample": toy_sample}, ()
        if args.checkpoint:
            net.requires_grad_(False).load_state_dict(args.loaded["ema"])
        net.to(device)
    else:
        net = build_unet(args, args.image_channels, args.image_channels, device)
        tasks = {"sample": sample, "test": test, "cost": cost, "loss": fluctuation}
        also = ("test",) if args.levels > 1 else ("loss",)
    run(args, tasks, net, loss_fn, data, also, objective=args.objective, levels=args.levels,
        projection=args.projection, num_projections=args.num_projections,
        data_noise=args.data_noise, eps=args.eps)


if __name__ == "__main__":
    main()
