"""The first three pictures of README.md: python assets/pictures.py [RUNS], in the project's root.

RUNS, by default runs, has the six default runs and the samples of
python ddim.py --checkpoint runs/ddpm-digits/checkpoint.pt
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

RUNS = {  # a run, and its first sample that a judge of digits reads with confidence
    "sliced_sm": ("sliced_sm-digits", 3), "ncsn": ("ncsn-digits", 0), "ddpm": ("ddpm-digits", 1),
    "ddim": ("ddpm-digits/sample", 0), "sde": ("sde-digits", 0), "d3pm": ("d3pm-digits", 2),
}
folder = Path(*sys.argv[1:] or ["runs"])
pages = {name: Image.open(folder / run / "process.png").convert("L")
         for name, (run, _) in RUNS.items()}


def state(name, sample, share, size):
    """One sample, size x size pixels, at this share of the way from noise to image."""
    page = pages[name]
    column = round(share * (page.width // 50 - 1))  # cells of 48 pixels and a line of 2
    cell = page.crop((50 * column + 2, 50 * sample + 2, 50 * column + 50, 50 * sample + 50))
    return cell.resize((size, size), Image.Resampling.NEAREST)


strip = Image.new("L", (600, 620), 255)
for i, (name, (_, sample)) in enumerate(RUNS.items()):
    ImageDraw.Draw(strip).text((100 * i + 50, 10), f"{name}.py", fill=0, anchor="mm")
    for row, share in enumerate([0, 0.5, 0.7, 0.85, 0.93, 1]):
        strip.paste(state(name, sample, share, 96), (100 * i + 2, 100 * row + 22))
strip.save("assets/strip.png", optimize=True)

frames = []
for k in range(16):
    frame = Image.new("L", (300, 150), 255)
    for i, name in enumerate(RUNS):
        for row in range(3):
            frame.paste(state(name, row, k / 15, 48), (50 * i + 1, 50 * row + 1))
    frames.append(frame.quantize(16))
frames[0].save("assets/process.gif", save_all=True, append_images=frames[1:], loop=0,
               duration=[200] * 15 + [2000])  # milliseconds

samples = Image.new("L", (3 * 300, 2 * 320), 255)
for i, (name, (run, _)) in enumerate(RUNS.items()):
    left, top = 300 * (i % 3), 320 * (i // 3)
    ImageDraw.Draw(samples).text((left + 2, top + 4), f"{name}.py", fill=0)
    for k in range(36):
        image = Image.open(folder / run / "images" / f"{k:06d}.png")
        place = left + 49 * (k % 6), top + 20 + 49 * (k // 6)
        samples.paste(image.resize((48, 48), Image.Resampling.NEAREST), place)
samples.save("assets/samples.png", optimize=True)
