"""Train a segmentation model on GeoTIFFs that are read by range requests.

    python examples/train.py                     the demo: makes scenes, serves them on loopback, trains
    python examples/train.py data=files data.images='scenes/*.tif' data.labels=labels.tif

Every setting lives in configs/ (Hydra): `data.batch_size=8`, `trainer=gpu`, `experiment=landcover`, `debug=limit`,
`ckpt_path=<checkpoint>` to go on, `-m data.size=64,96` for a run of each ...
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
from assembly import class_names, new_task, new_trainer, opened
from mapping import draw, map_writer
from omegaconf import DictConfig, OmegaConf
from scoring import ClassScores, print_scores

from rasteret_ml import LoaderMonitor
from rasteret_ml.train.losses import majority_baseline, mean_iou

log = logging.getLogger("train")


def run(config: DictConfig) -> dict[str, Any]:
    """Build, train, validate, draw the map; returns what was measured and written."""
    began = time.perf_counter()
    with opened(config) as data:
        data.prepare_data()
        data.setup("fit")
        log.info("%s", data.collection)
        if data.collection.report is not None:
            log.info("%s", data.collection.report)
        names = class_names(config, data)
        scores, writer = ClassScores(), map_writer(Path(config.paths.output_dir) / "prediction.tif", names)
        task = new_task(config, data)
        trainer = new_trainer(config, scores, writer)
        trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path)
        result: dict[str, Any] = {"metrics": {name: float(v) for name, v in trainer.callback_metrics.items()}}
        result["task"] = task
        if data.val_area is not None:
            trainer.validate(task, datamodule=data, verbose=False)
        if config.draw and not trainer.fast_dev_run:
            trainer.predict(task, datamodule=data, return_predictions=False)
        if trainer.is_global_zero:
            result |= finish(trainer, data, scores, writer.paths, names)
            print(f"whole run            {time.perf_counter() - began:.0f} s")
    return result


def finish(trainer: pl.Trainer, data: Any, scores: ClassScores, maps: list[str], names: list[str]) -> dict[str, Any]:
    """Say what a person wants to know."""
    found: dict[str, Any] = {}
    print()
    for speed in (callback for callback in trainer.callbacks if isinstance(callback, LoaderMonitor)):
        print(f"patches per second   {speed.patches_per_second:.1f}")
        print(f"wait share           {100 * speed.wait_share:.1f} % of training time spent waiting for data")
    title = "prediction"
    if scores.confusion is not None:
        found |= {"confusion": scores.confusion, "miou": mean_iou(scores.confusion)}
        found |= {"baseline": majority_baseline(scores.confusion)}
        title = f"mIoU {found['miou']:.3f} on the held-out area (majority class {found['baseline']:.3f})"
        print_scores(scores.confusion, names)
    for path in maps:
        found |= {"map": path, "picture": draw(data, path, Path(path).with_suffix(".png"), names, title)}
        print(f"map                  {path}")
        print(f"picture              {found['picture']}")
    checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
    if checkpoint:
        print(f"checkpoint           {checkpoint}")
    return found


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> Any:
    """Entry point; what it returns is what a sweep may optimise."""
    log.debug("%s", OmegaConf.to_yaml(config))
    return run(config).get("miou")


if __name__ == "__main__":
    main()
