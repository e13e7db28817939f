"""Train a segmentation model on GeoTIFFs that are read by range requests.

    python examples/train.py                     the demo: makes scenes, serves them on loopback, trains
    python examples/train.py data=files data.images='scenes/*.tif' data.labels=labels.tif

All settings are in configs/ (Hydra): `data.loading.batch_size=8`, `trainer=gpu`, `experiment=landcover`, `debug=limit`,
`ckpt_path=<checkpoint>` to resume, `-m data.sampling.size=64,96` for a run with each size; `--cfg job` prints them all.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
from experiment import (
    ClassScores,
    build_map_writer,
    build_task,
    build_trainer,
    class_names,
    draw_map,
    majority_iou,
    mean_iou,
    open_data,
    print_scores,
)
from omegaconf import DictConfig, OmegaConf

from rasteret_ml import LoaderMonitor

log = logging.getLogger("train")


def run(config: DictConfig) -> dict[str, Any]:
    """Train, validate and draw a map; return metrics, the task and the paths of what was written."""
    began = time.perf_counter()
    with open_data(config) as data:
        data.prepare_data()
        data.setup("fit")
        log.info("%s", data.collection)
        if data.collection.report is not None:
            log.info("%s", data.collection.report)
        names = class_names(config, data)
        scores, writer = ClassScores(), build_map_writer(Path(config.paths.output_dir) / "prediction.tif", names)
        task = build_task(config, data)
        trainer = build_trainer(config, scores, writer)
        trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result: dict[str, Any] = {"metrics": metrics, "task": task}
        if data.val_area is not None:
            trainer.validate(task, datamodule=data, verbose=False)
        if config.draw and not trainer.fast_dev_run:
            trainer.predict(task, datamodule=data, return_predictions=False)
        if trainer.is_global_zero:
            result |= report(trainer, data, scores, writer.paths, names)
            print(f"whole run            {time.perf_counter() - began:.0f} s")
    return result


def report(trainer: pl.Trainer, data: Any, scores: ClassScores, maps: list[str], names: list[str]) -> dict[str, Any]:
    """Print speed, scores and paths, and draw the maps; return what was found."""
    found: dict[str, Any] = {}
    print()
    for monitor in (callback for callback in trainer.callbacks if isinstance(callback, LoaderMonitor)):
        print(f"patches per second   {monitor.patches_per_second:.1f}")
        print(f"wait share           {100 * monitor.wait_share:.1f} % of training time spent waiting for data")
    title = "prediction"
    if scores.confusion is not None:
        found["confusion"] = scores.confusion
        found["miou"], found["baseline"] = mean_iou(scores.confusion), majority_iou(scores.confusion)
        title = f"mIoU {found['miou']:.3f} on the held-out area (majority class {found['baseline']:.3f})"
        print_scores(scores.confusion, names)
    for path in maps:
        found |= {"map": path, "picture": draw_map(data, path, Path(path).with_suffix(".png"), names, title)}
        print(f"map                  {path}")
        print(f"picture              {found['picture']}")
    checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
    if checkpoint:
        print(f"checkpoint           {checkpoint}")
    return found


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> Any:
    """Run; return the mean IoU, which a sweep may optimise."""
    log.debug("%s", OmegaConf.to_yaml(config))
    return run(config).get("miou")


if __name__ == "__main__":
    main()
