"""Predict everything that images cover, and write a georeferenced map (a Cloud Optimized GeoTIFF).

    python examples/predict.py ckpt_path=<checkpoint> data.images='elsewhere/*.tif' map=map.tif

Model, bands, mean, std and classes come from the checkpoint; no labels are read.
"""

from __future__ import annotations

import hydra
from experiment import build_map_writer, build_trainer, class_names, load_task, open_data
from omegaconf import DictConfig


def run(config: DictConfig) -> list[str]:
    """Predict; return the paths of the maps."""
    with open_data(config) as data:
        task = load_task(config)
        names = class_names(config, data) or [f"class {i}" for i in range(int(task.hparams["num_classes"]))]
        writer = build_map_writer(config.map, names)
        trainer = build_trainer(config, writer)
        trainer.predict(task, datamodule=data, ckpt_path=config.ckpt_path, return_predictions=False)
        if trainer.is_global_zero:
            for path in writer.paths:
                print(f"map                  {path}")
    return writer.paths


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(config: DictConfig) -> None:
    """Run."""
    run(config)


if __name__ == "__main__":
    main()
