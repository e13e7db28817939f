"""Score a trained model on the area held out for testing, or for validation if there is no test area.

    python examples/eval.py ckpt_path=<checkpoint> data=files data.images='scenes/*.tif' data.labels=labels.tif

Model, bands, mean, std and classes come from the checkpoint.
"""

from __future__ import annotations

from typing import Any

import hydra
from experiment import ClassScores, build_trainer, class_names, load_task, mean_iou, open_data, print_scores
from omegaconf import DictConfig


def run(config: DictConfig) -> dict[str, Any]:
    """Test; return the metrics."""
    with open_data(config) as data:
        scores, task = ClassScores(), load_task(config)
        trainer = build_trainer(config, scores)
        (metrics,) = trainer.test(task, datamodule=data, ckpt_path=config.ckpt_path)
        assert scores.confusion is not None
        if trainer.is_global_zero:
            print_scores(scores.confusion, class_names(config, data), "test")
    return {"metrics": metrics, "miou": mean_iou(scores.confusion)}


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(config: DictConfig) -> Any:
    """Run; return the mean IoU."""
    return run(config)["miou"]


if __name__ == "__main__":
    main()
