"""Land cover from a cloudy season: a small network on [B, T, C, H, W] that uses only clear dates.

    python examples/time_series_model.py                          the demo: six dates, four classes
    python examples/time_series_model.py --data 'items/*/*.json' --labels cover.tif

The network encodes each date with its day of the year and weights a pixel's dates by attention, over the dates that are
no padding (`time_valid`) and on which the pixel is valid and clear. For comparison, the same network is trained on the
newest date alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
import torch
from demo_scenes import BANDS
from demo_sets import make_season, make_season_cover
from figures import colour, stretch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import nn

import rasteret_ml as rm

YEAR = 365.25 * 86400  # seconds


class SeasonNet(nn.Module):
    """Attention over the dates of a pixel, then convolution over its neighbourhood."""

    def __init__(self, bands: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(bands + 2, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())
        self.attention = nn.Conv2d(width, 1, 1)
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, classes, 1))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return logits `[B, K, H, W]` for a normalized batch."""
        image, (count, dates) = batch["image"], batch["image"].shape[:2]
        usable = batch["mask_valid"] & batch["mask_clear"] & batch["time_valid"][:, :, None, None, None]
        angle = 2 * torch.pi * torch.nan_to_num(batch["time"] / YEAR).float()  # NaN where padded
        season = torch.stack([angle.sin(), angle.cos()], 2)[..., None, None].expand(-1, -1, -1, *image.shape[-2:])
        encoded = self.encode(torch.cat([image, season], 2).flatten(0, 1))
        scores = self.attention(encoded).unflatten(0, (count, dates))
        weights = scores.masked_fill(~usable, -1e9).softmax(1) * usable
        return self.head((weights * encoded.unflatten(0, (count, dates))).sum(1))


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the season and on the newest date, print both accuracies, draw."""
    options = arguments(argv)
    items, labels = sorted(glob(options.data or "")), options.labels
    if options.data is None:
        items, labels = make_season(options.out / "demo"), make_season_cover(options.out / "demo")
    collection = rm.build([str(item) for item in items], options.out / "season.parquet", bands=[*BANDS, "SCL"])
    cover = rm.build(str(labels), options.out / "cover.parquet", datetime=None)
    scores, chips = {}, {}
    for name, length in (("season", options.length), ("newest date", 1)):  # number of latest dates
        images = rm.RasteretDataset(
            collection, BANDS, quality="sentinel-2-scl", series=length, reading={"cache_bytes": 2**26}
        )
        scores[name], chips[name] = learn(images, cover, options)
        print(f"{name:<21}{scores[name]:.3f} of held-out pixels correct")
    print(f"picture              {draw(chips, scores, options.out / 'time_series_model.png')}")


def learn(images: rm.RasteretDataset, cover: rm.Collection, options: argparse.Namespace) -> tuple[float, list[dict]]:
    """Train a network; return its accuracy on held-out blocks and their batches with `predicted`."""
    torch.manual_seed(options.seed)
    labels = partial(rm.RasteretDataset, cover, cover.bands, is_image=False, crs=images.crs)
    remap = {value: i for i, value in enumerate(rm.dataset_statistics(labels()).classes)}
    data = images & labels(labels={"remap": remap})
    blocks = rm.split_blocks(data, 2 * options.size * images.res[0], {"train": 0.7, "val": 0.3}, seed=options.seed)
    train, val = (blocks[blocks["split"] == name] for name in ("train", "val"))
    statistics = rm.dataset_statistics(images, aois=train, size=options.size)
    normalize, augment = partial(rm.normalize, mean=statistics.mean, std=statistics.std), rm.Augmentation()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = SeasonNet(len(BANDS), len(remap)).to(device)
    loss, optimizer = rm.MaskedLoss(nn.CrossEntropyLoss(reduction="none")), torch.optim.Adam(net.parameters(), 5e-3)
    sampler = rm.RandomAOISampler(data, options.size, 8 * options.steps, train, seed=options.seed)
    loader = rm.DataLoader(data, batch_size=8, sampler=sampler)
    for batch in rm.device_batches(loader, device, lambda native: augment(normalize(native))):
        optimizer.zero_grad()
        loss(net(batch), batch["mask"]).backward()
        optimizer.step()

    correct, chips = [], []
    loader = rm.DataLoader(data, batch_size=8, sampler=rm.GridAOISampler(data, options.size, aois=val))
    with torch.no_grad():
        for batch in rm.device_batches(loader, device, normalize):
            predicted = net(batch).argmax(1)
            correct.append((predicted == batch["mask"])[batch["mask"] != -100].float())
            chips.append(batch | {"predicted": predicted})
    return float(torch.cat(correct).mean()), chips


def draw(chips: dict[str, list[dict]], scores: dict[str, float], path: Path) -> Path:
    """Draw held-out chips: their clearest date, the labels and both predictions."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(4, 6, subplot_kw={"xticks": [], "yticks": []})
    season, newest = chips["season"][0], chips["newest date"][0]
    colours = ListedColormap([np.array(colour(i)) / 255 for i in range(10)])
    clearest = (season["mask_valid"] & season["mask_clear"]).float().mean((2, 3, 4)).argmax(1)
    for column in range(min(6, len(clearest))):
        image, valid = (season[key][column, clearest[column]].cpu().numpy() for key in ("image", "mask_valid"))
        axes[0, column].imshow(stretch(image[[2, 1, 0]], valid[0]))
        for row, classes in enumerate((season["mask"], season["predicted"], newest["predicted"]), start=1):
            masked = np.ma.masked_less(classes[column].cpu().numpy(), 0)
            axes[row, column].imshow(masked, cmap=colours, vmin=0, vmax=9, interpolation="nearest")
    for row, text in enumerate(("clearest date", "labels", *(f"{n}: {s:.0%}" for n, s in scores.items()))):
        axes[row, 0].set_ylabel(text)
    figure.suptitle("Held-out chips of a cloudy season")
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/time_series_model"), help="output folder")
    parser.add_argument(
        "--data", help="glob pattern of STAC items (JSON) with B02, B03, B04, B08 and SCL; default: the demo"
    )
    parser.add_argument("--labels", help="label raster, with --data")
    for name, default in {"size": 32, "length": 6, "steps": 40, "seed": 0}.items():  # pixels, dates, batches of 8
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
