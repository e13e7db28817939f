"""Score a trained model on the area held out for testing (where there is none, for validation).

    python examples/eval.py ckpt_path=<checkpoint> data=files data.images='scenes/*.tif' data.labels=labels.tif

Model, bands, mean, std and classes are the checkpoint's.
"""

from __future__ import annotations

from typing import Any

import hydra
from assembly import class_names, new_trainer, opened, trained_task
from omegaconf import DictConfig
from scoring import ClassScores, print_scores

from rasteret_ml.train.losses import mean_iou


def run(config: DictConfig) -> dict[str, Any]:
    """Test; returns what was measured."""
    with opened(config) as data:
        scores, task = ClassScores(), trained_task(config)
        trainer = new_trainer(config, scores)
        (metrics,) = trainer.test(task, datamodule=data, ckpt_path=config.ckpt_path)
        assert scores.confusion is not None
        if trainer.is_global_zero:
            print_scores(scores.confusion, class_names(config, data), "test")
    return {"metrics": metrics, "miou": mean_iou(scores.confusion)}


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(config: DictConfig) -> Any:
    """Entry point."""
    return run(config)["miou"]


if __name__ == "__main__":
    main()
