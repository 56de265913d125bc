"""The U-Net of DDPM (Ho, Jain, Abbeel 2020, arXiv:2006.11239, App. B), shared by all scripts.

Layer for layer the network that the authors released: the defaults are their CIFAR-10 model with
35,746,307 parameters, whose published weights could be copied in.

    net = UNet()                                                        # CIFAR-10, 3 x 32 x 32
    net = UNet(1, 1, channels=32, channel_mult=(1, 2, 2), image_size=16)    # small and grey
    eps = net(x, t)              # x (B, 3, H, W), t (B,) -> (B, 3, H, W)

What the released code does and the paper does not say:
1. GroupNorm's eps is 1e-6, not PyTorch's 1e-5.
2. Before a strided convolution the image is padded at the right and at the bottom only.
3. The last convolution of each block, the last projection of each attention and the last layer
   start at almost zero: a new network returns about 0, and the first DDPM loss is 1.
"""

import math

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
        for weight in self.qkv.weight.data.chunk(3):  # as the three layers that it replaces
            nn.init.xavier_uniform_(weight)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, H W, C)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, dim=3)  # each (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # softmax(q k^T / sqrt(C)) v
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them; then the attention, if any."""

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
    def __init__(self, channels):
        super().__init__()
        self.conv = init(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x, temb):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, temb):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2 H, 2 W)


class UNet(nn.Module):
    """forward(x (B, in_channels, H, W), t (B,) int or float) -> (B, out_channels, H, W).

    Level i works at 1 / 2^i of the resolution with channels * channel_mult[i] channels, in
    num_res_blocks blocks on the way down and one more on the way up. It has attention where
    image_size / 2^i is one of attention_resolutions; H and W may differ from image_size and from
    each other. t is embedded as it comes: DDPM's weights expect 0..T-1. ValueError: H or W is no
    multiple of 2^(levels - 1), x has other channels, or groups cannot split the channels.
    """

    def __init__(self, in_channels=3, out_channels=3, channels=128, channel_mult=(1, 2, 2, 2),
                 num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, image_size=32):
        super().__init__()
        self.in_channels, self.channels = in_channels, channels
        self.multiple = 2 ** (len(channel_mult) - 1)  # of H and W
        widest = 2 * channels * max(channel_mult)  # with its skip connection
        if channels % (4 if widest <= 128 else 32):
            raise ValueError(f"channels = {channels} does not split into groups: a multiple of "
                             "32 does, or of 4 where channels * channel_mult is at most 64")
        temb = 4 * channels
        first, second = init(nn.Linear(channels, temb)), init(nn.Linear(temb, temb))
        self.time_mlp = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())  # each block's own swish
        self.conv_in = init(nn.Conv2d(in_channels, channels, 3, padding=1))
        widths = [channels * m for m in channel_mult]
        attends = [image_size / 2**i in attention_resolutions for i in range(len(widths))]
        last = len(widths) - 1

        self.down, h, skips = nn.ModuleList(), channels, [channels]
        for i, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(ResBlock(h, width, temb, dropout, attends[i]))
                h = width
                skips.append(h)
            if i < last:
                self.down.append(Downsample(h))
                skips.append(h)

        self.mid = nn.ModuleList([ResBlock(h, h, temb, dropout, a) for a in (True, False)])

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(ResBlock(h + skips.pop(), width, temb, dropout, attends[i]))
                h = width
            if i > 0:
                self.up.append(Upsample(h))

        self.norm_out = group_norm(h)
        self.conv_out = init(nn.Conv2d(h, out_channels, 3, padding=1), scale=0)

    def forward(self, x, t):
        B, C, H, W = x.shape
        if C != self.in_channels or H % self.multiple or W % self.multiple:
            raise ValueError(f"images {C}x{H}x{W}: the network takes {self.in_channels} channels, "
                             f"height and width must be multiples of {self.multiple}")
        temb = self.time_mlp(time_embedding(t, self.channels).to(x.dtype))  # (B, 4 C)
        # (B, C, H, W); a 1-channel x has no layout to hand on, so channels_last begins here
        h = self.conv_in(x).contiguous(memory_format=torch.channels_last)
        skips = [h]
        for module in self.down:  # (B, C, H, W) -> (B, C * mult[-1], H / multiple, W / multiple)
            h = module(h, temb)
            skips.append(h)
        for module in self.mid:
            h = module(h, temb)
        for module in self.up:  # back to (B, C * mult[0], H, W)
            if isinstance(module, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h, temb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, H, W)
