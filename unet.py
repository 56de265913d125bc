"""The U-Net of DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239, App. B), shared by all scripts.

Layer for layer the network that the authors released: the defaults are their CIFAR-10 model with
35,746,307 parameters. UNet.load_published loads its published weights.

    net = UNet()                                                        # CIFAR-10, 3 x 32 x 32
    net = UNet(1, 1, channels=32, channel_mult=(1, 2, 2), image_size=16)    # small and grey
    eps = net(x, t)              # x (B, 3, H, W), t (B,) -> (B, 3, H, W)

ddpm_plus_plus() and ncsn_plus_plus(), built below from the same parts, are the larger networks of
Score-SDE (Song et al. 2021, arXiv:2011.13456, Sec. 4.4 and App. H), also layer for layer, with
61,804,419 and 62,758,787 parameters; num_res_blocks=8 gives the "deep" ones.

What the released code does and the paper does not say:
1. GroupNorm's eps is 1e-6, not PyTorch's 1e-5.
2. Before a strided convolution the image is padded at the right and at the bottom only.
3. The last convolution of each block, the last projection of each attention and the last layer
   start at almost zero: a new network returns about 0, and the first DDPM loss is 1.
"""

import json
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def init(layer, scale=1.0):
    """As released: uniform weights of variance scale / mean(fan-in, fan-out), zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(max(scale, 1e-10)))  # never quite zero
    nn.init.zeros_(layer.bias)
    if isinstance(layer, nn.Conv2d):  # the layout that convolutions are fastest in
        layer.to(memory_format=torch.channels_last)
    return layer


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def time_embedding(t, dim):
    """The Transformer's position embedding, sines first: t (B,) -> (B, dim) float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) / (half - 1) * steps)  # (half,): 1 ... 1e-4
    angle = t.float()[:, None] * frequency  # (B, half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Attention(nn.Module):
    """Self-attention over the H W positions, one head, with a residual connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = init(nn.Linear(channels, channels), scale=0)
        nn.init.zeros_(self.qkv.bias)
        for weight in self.qkv.weight.data.chunk(3):  # like the three layers that it replaces
            nn.init.xavier_uniform_(weight)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, H W, C)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, dim=3)  # each (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # softmax(q k^T / sqrt(C)) v
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them; then the attention, if any."""

    takes_skip = True  # on the way up it joins a state of the way down

    def __init__(self, in_channels, out_channels, temb_channels, dropout, attention):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = init(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.temb = init(nn.Linear(temb_channels, out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = init(nn.Conv2d(out_channels, out_channels, 3, padding=1), scale=0)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else init(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        h = h + self.temb(temb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Downsample(nn.Module):
    def __init__(self, channels, *_):
        super().__init__()
        self.conv = init(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x, temb):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    takes_skip = False

    def __init__(self, channels, *_):
        super().__init__()
        self.conv = init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, temb):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2 H, 2 W)


class UNet(nn.Module):
    """forward(x (B, in_channels, H, W), t (B,) int or float) -> (B, out_channels, H, W).

    Level i works at 1 / 2^i of the resolution with channels * channel_mult[i] channels, in
    num_res_blocks blocks on the way down and one more on the way up. It has attention where
    image_size / 2^i is one of attention_resolutions (of a pair, the larger size); H and W may
    differ from image_size and from each other. t is embedded as it comes: DDPM's weights expect
    0..T-1. ValueError: H or W is not a multiple of 2^(levels - 1), x has other channels, or groups
    cannot split the channels.
    block, down, up: what makes the parts; up_attends: every block on the way up may have attention,
    not only the last of a level (as in ScoreUNet)."""

    def __init__(self, in_channels=3, out_channels=3, channels=128, channel_mult=(1, 2, 2, 2),
                 num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=32, *,
                 block=ResBlock, down=Downsample, up=Upsample, up_attends=True):
        super().__init__()
        self.in_channels, self.channels, self.num_res_blocks = in_channels, channels, num_res_blocks
        self.multiple = 2 ** (len(channel_mult) - 1)  # of H and W
        widest = 2 * channels * max(channel_mult)  # with its skip connection
        if channels % (4 if widest <= 128 else 32):
            raise ValueError(f"channels = {channels} does not split into groups: take a multiple "
                             "of 32, or of 4 where channels * channel_mult is at most 64")
        temb = 4 * channels
        first, second = init(nn.Linear(channels, temb)), init(nn.Linear(temb, temb))
        self.time_mlp = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())  # the blocks' swish
        self.conv_in = init(nn.Conv2d(in_channels, channels, 3, padding=1))
        widths = [channels * m for m in channel_mult]
        size = image_size if isinstance(image_size, (int, float)) else max(image_size)
        attends = [size / 2**i in attention_resolutions for i in range(len(widths))]

        self.down, h, skips = nn.ModuleList(), channels, [channels]
        for i, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(block(h, width, temb, dropout, attends[i]))
                h = width
                skips.append(h)
            if i < len(widths) - 1:
                self.down.append(down(h, h, temb, dropout))
                skips.append(h)

        self.mid = nn.ModuleList([block(h, h, temb, dropout, a) for a in (True, False)])

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for j in range(num_res_blocks + 1):
                attention = attends[i] and (up_attends or j == num_res_blocks)
                self.up.append(block(h + skips.pop(), width, temb, dropout, attention))
                h = width
            if i > 0:
                self.up.append(up(h, h, temb, dropout))

        self.norm_out = group_norm(h)
        self.conv_out = init(nn.Conv2d(h, out_channels, 3, padding=1), scale=0)

    def time_features(self, t):
        return time_embedding(t, self.channels)  # (B, C)

    def way_down(self, x, temb):
        """The states (B, C, H, W) ... (B, C * mult[-1], H / multiple, W / multiple)."""
        # a 1-channel x has no memory layout to pass on, so channels_last begins here
        states = [self.conv_in(x).contiguous(memory_format=torch.channels_last)]
        for module in self.down:
            states.append(module(states[-1], temb))
        return states

    def forward(self, x, t):
        C, H, W = x.shape[1:]
        if C != self.in_channels or H % self.multiple or W % self.multiple:
            raise ValueError(f"images {C}x{H}x{W}: the network takes {self.in_channels} channels, "
                             f"height and width must be multiples of {self.multiple}")
        temb = self.time_mlp(self.time_features(t).to(x.dtype))  # (B, 4 C)
        skips = self.way_down(x, temb)
        h = skips[-1]
        for module in self.mid:
            h = module(h, temb)
        for module in self.up:  # back to (B, C * mult[0], H, W)
            if module.takes_skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h, temb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, H, W)

    def load_published(self, path):
        """Take the weights of a network like google/ddpm-cifar10-32 as diffusers saves them, from a
        .safetensors or .bin file or a folder with diffusion_pytorch_model.safetensors or .bin.
        ValueError, and no weight changes, if the file is damaged, a tensor is missing, unknown or
        of another shape, or a config.json beside it is that of another network."""
        inside = [Path(path, f"diffusion_pytorch_model.{kind}") for kind in ("safetensors", "bin")]
        file = next((file for file in inside if file.is_file()), Path(path))
        widths = {m.qkv.in_features for m in self.modules() if isinstance(m, Attention)}
        one_head = (None, *widths) if len(widths) == 1 else (None,)
        check_config(file.with_name("config.json"), CONFIG | {"attention_head_dim": (8, *one_head)})
        found, wanted = read_weights(file), {}  # diffusers' name -> tensor
        names = OLD_NAMES if any(".query." in name for name in found) else NEW_NAMES
        for name, tensor in self.state_dict().items():
            parts = "qkv" if "qkv" in name else ["qkv"]  # our one layer is three of diffusers'
            for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
                ours = name.replace("qkv", part)
                wanted[published_name(ours, self.num_res_blocks, names)] = rows
        for name in (*wanted, *found):
            there, here = (list(d[name].shape) if name in d else "missing" for d in (found, wanted))
            if there != here:
                raise ValueError(f"{file}: {name!r} is {there}, in the network {here}")
        for name, rows in wanted.items():
            rows.copy_(found[name])


# ---- Published weights ---------------------------------------------------------------------------

# Our names -> diffusers' names. Its older files name the layers of an attention differently.
NEW_NAMES = {"time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2",
             "norm_out": "conv_norm_out", "temb": "time_emb_proj", "shortcut": "conv_shortcut",
             "mid_blocks.0": "mid_block", "attention.norm": "group_norm", "attention.q": "to_q",
             "attention.k": "to_k", "attention.v": "to_v", "attention.out": "to_out.0"}
OLD_NAMES = NEW_NAMES | {"attention.q": "query", "attention.k": "key", "attention.v": "value",
                         "attention.out": "proj_attn"}


def published_name(name, num_res_blocks, names):
    """diffusers' name: down.4.temb.bias is down_blocks.1.resnets.1.time_emb_proj.bias, since down.0
    to down.2 are level 0's two blocks and its Downsample."""
    if match := re.fullmatch(r"(down|mid|up)\.(\d+)\.(.+)", name):
        path, index, layer = match.groups()
        level, i = divmod(int(index), num_res_blocks + (1 if path == "down" else 2))
        part = "attentions" if layer.startswith("attention.") else "resnets"
        if layer.startswith("conv."):  # Downsample or Upsample, the last module of its level
            part, i = f"{path}samplers", 0
        name = f"{path}_blocks.{level}.{part}.{i}.{layer}"
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


# What no tensor's shape tells: diffusers' default, which a missing key has, and what is right.
CONFIG = dict(flip_sin_to_cos=(True, False), freq_shift=(0, 1), downsample_padding=(1, 0),
              norm_eps=(1e-5, 1e-6))
PROCESS = dict(prediction_type=2 * ("epsilon",), beta_schedule=2 * ("linear",),
               beta_start=2 * (1e-4,), beta_end=2 * (0.02,), num_train_timesteps=2 * (1000,))


def check_config(file, wanted):
    """ValueError if there is such a file, and it is damaged or has other values than wanted."""
    if not file.is_file():
        return
    try:
        config = dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for key, (default, *right) in wanted.items():
        if config.get(key, default) not in right:
            raise ValueError(f"{file}: {key} is {config.get(key, default)!r}, here {right[0]!r}")


def read_weights(file):
    """Name -> float32 tensor. A .safetensors file is the header's length in 8 bytes, the header in
    JSON with the type, shape and place of each tensor, and the tensors' numbers without a gap."""
    try:
        if file.suffix != ".safetensors":  # weights_only keeps a hostile file from running code
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            data, tensors, end = bytearray(file.read_bytes()), {}, 0
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            numbers = torch.frombuffer(data[start:], dtype=torch.float32)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = end, end + math.prod(entry["shape"])
                if entry["dtype"] != "F32" or entry["data_offsets"] != [4 * begin, 4 * end]:
                    raise ValueError("another type, a gap or an overlap")
                tensors[name] = numbers[begin:end].view(entry["shape"])
            if end != len(numbers):
                raise ValueError("numbers of no tensor")
        return {str(name): tensor.to_dense().float() for name, tensor in tensors.items()}
    except Exception as error:  # whatever a damaged file makes json and the unpickler raise
        raise ValueError(f"{file} is missing, damaged or not a file of float32 weights") from error


def published(name):
    """A checkpoint like ddpm.py's, of published CIFAR-10 weights. name: a file or folder for
    load_published, or a model of the Hugging Face hub, downloaded once, into torch's cache.
    ValueError also for a scheduler_config.json of another process than DDPM's."""
    path = Path(name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        path = Path(torch.hub.get_dir(), "checkpoints", name.replace("/", "--"))
        path.mkdir(parents=True, exist_ok=True)
        files = [path / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
        url = f"https://huggingface.co/{name}/resolve/main"
        for file in (path / "config.json", *files):
            if not any(x.is_file() for x in files):
                try:
                    torch.hub.download_url_to_file(f"{url}/{file.name}", file)
                except Exception as error:  # whatever a server makes urllib raise
                    reason = error
        if not any(x.is_file() for x in files):
            raise OSError(f"cannot download {url}/{files[0].name} ({reason}): put it into {path}")
    net, folder = UNet(), path if path.is_dir() else path.parent
    net.load_published(path)
    check_config(folder / "scheduler_config.json", PROCESS)
    check_config(folder / "scheduler" / "scheduler_config.json", PROCESS)
    settings = dict(dataset="cifar10", image_channels=3, image_size=[32, 32], channels=128,
                    channel_mult=[1, 2, 2, 2], num_res_blocks=2, attention_resolutions=[16],
                    dropout=0.1, T=1000, beta_1=1e-4, beta_T=0.02)
    return {"method": "ddpm", "step": None, "settings": settings, "ema": net.state_dict()}


# ---- DDPM++ and NCSN++ (arXiv:2011.13456, Sec. 4.4 and App. H) -----------------------------------

# FIR resampling (Zhang 2019, arXiv:1904.11486) avoids aliasing with the filter [1, 3, 3, 1] / 8 in
# each direction. It equals [1, 1] / 2 applied three times, and plain resampling applies it once.


def smooth(x):  # [1, 2, 1] / 4 in each direction, with zeros around the image
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1)  # (B, C, H, W)


def halve(x, fir):
    return F.avg_pool2d(smooth(x) if fir else x, 2)  # (B, C, H / 2, W / 2)


def double(x, fir):
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2 H, 2 W)
    return smooth(x) if fir else x


def fir_blur(x):  # at the corners of the pixels, before a strided convolution without padding
    return F.avg_pool2d(smooth(F.pad(x, (1, 1, 1, 1))), 2, stride=1)  # (B, C, H + 1, W + 1)


class BigGANBlock(ResBlock):
    """DDPM's block, but it can resample inside (BigGAN, arXiv:1809.11096) and rescales its sums."""

    def __init__(self, in_channels, out_channels, temb_channels, dropout, attention=False,
                 resample=None, fir=False):
        super().__init__(in_channels, out_channels, temb_channels, dropout, attention)
        self.attends, self.resample, self.fir = attention, resample, fir
        self.takes_skip = resample is None
        if resample is not None:  # as released, even if the number of channels stays the same
            self.shortcut = init(nn.Conv2d(in_channels, out_channels, 1))
        if attention:  # as released: a tenth of the variance of DDPM's q, k and v
            self.attention.qkv.weight.data.mul_(math.sqrt(0.1))

    def forward(self, x, temb):
        h = F.silu(self.norm1(x))
        if self.resample is not None:  # both branches, before the first convolution
            x, h = self.resample(x, self.fir), self.resample(h, self.fir)
        h = self.conv1(h) + self.temb(temb)[:, :, None, None]  # (B, out, H', W')
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        h = (self.shortcut(x) + h) / math.sqrt(2)  # the variance does not grow with depth: App. H
        return self.attention(h) / math.sqrt(2) if self.attends else h


class ScoreUNet(UNet):
    """forward, levels, widths and errors are those of UNet. What App. H changes:

    1. One more BigGANBlock halves the image after each level and doubles it on the way up.
    2. On the way up a level has one attention, after its num_res_blocks + 1 blocks (as released).
    3. fir: resample with the filter [1, 3, 3, 1]; otherwise with means of 2 x 2 pixels and copies.
    4. progressive_input ("residual"): a pyramid of ever smaller images is added at each level.
    5. fourier: the time enters by random Fourier features (Tancik et al. 2020, arXiv:2006.10739);
       otherwise by DDPM's time_embedding."""

    def __init__(self, in_channels=3, out_channels=3, num_res_blocks=4, channels=128,
                 channel_mult=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1, image_size=32,
                 *, fir=False, progressive_input=False, fourier=False):
        super().__init__(in_channels, out_channels, channels, channel_mult, num_res_blocks,
                         attention_resolutions, dropout, image_size, block=BigGANBlock,
                         down=partial(BigGANBlock, resample=halve, fir=fir),
                         up=partial(BigGANBlock, resample=double, fir=fir), up_attends=False)
        self.pyramid = nn.ModuleList()
        inputs = [in_channels, *(channels * m for m in channel_mult[:-1])]
        for above, below in pairwise(inputs if progressive_input else ()):
            self.pyramid.append(init(nn.Conv2d(above, below, 3, stride=2)))
        if fourier:
            self.time_mlp[0] = init(nn.Linear(2 * channels, 4 * channels))
        frequency = 16 * torch.randn(channels) if fourier else None  # N(0, 16^2), never trained
        self.register_buffer("frequency", frequency)

    def time_features(self, t):
        if self.frequency is None:
            return super().time_features(t)
        angle = 2 * math.pi * t.float()[:, None] * self.frequency  # (B, C)
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, 2 C)

    def way_down(self, x, temb):
        states, pyramid = [self.conv_in(x).contiguous(memory_format=torch.channels_last)], x
        convs = iter(self.pyramid)
        for block in self.down:
            h = block(states[-1], temb)
            if self.pyramid and block.resample is not None:
                pyramid = next(convs)(fir_blur(pyramid))  # now half as high and wide, like h
                h = pyramid = (h + pyramid) / math.sqrt(2)
            states.append(h)
        return states


# DDPM++, for the VP and sub-VP SDEs: t is 999 times the SDE's time, which ends at 1. NCSN++ cont.,
# for the VE SDE: t is log sigma, and the output / sigma is the score.
ddpm_plus_plus = ScoreUNet
ncsn_plus_plus = partial(ScoreUNet, fir=True, progressive_input=True, fourier=True)
