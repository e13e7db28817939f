"""Predict all that images cover, and write a georeferenced map (a Cloud Optimized GeoTIFF).

    python examples/predict.py ckpt_path=<checkpoint> data.images='elsewhere/*.tif' map=map.tif

Model, bands, mean, std and classes are the checkpoint's; no labels are read.
"""

from __future__ import annotations

import hydra
from assembly import class_names, new_trainer, opened, trained_task
from mapping import map_writer
from omegaconf import DictConfig


def run(config: DictConfig) -> list[str]:
    """Predict; returns the maps written."""
    with opened(config) as data:
        task = trained_task(config)
        names = class_names(config, data) or [f"class {i}" for i in range(int(task.hparams["num_classes"]))]
        writer = map_writer(config.map, names)
        trainer = new_trainer(config, writer)
        trainer.predict(task, datamodule=data, ckpt_path=config.ckpt_path, return_predictions=False)
        if trainer.is_global_zero:
            for path in writer.paths:
                print(f"map                  {path}")
    return writer.paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(config: DictConfig) -> None:
    """Entry point."""
    run(config)


if __name__ == "__main__":
    main()
