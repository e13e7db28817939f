"""The same training with LightningCLI, from one YAML.

    python examples/cli.py fit --config configs/cli/landcover.yaml --data.loading.batch_size 8
    python examples/cli.py test --config configs/cli/landcover.yaml --ckpt_path <checkpoint>
    python examples/cli.py fit --help

`validate` and `predict` work likewise.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from rasteret_ml import RasteretDataModule


class RasteretCLI(LightningCLI):
    """LightningCLI with one `ignore_index` for data and model."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Link the model's `ignore_index` to the data's."""
        parser.link_arguments("data.ignore_index", "model.init_args.ignore_index")


def main(args: Any = None, *, run: bool = True) -> RasteretCLI:
    """Build what the arguments (default those of the command line) say, and run it."""
    return RasteretCLI(
        pl.LightningModule,
        RasteretDataModule,
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        run=run,
        args=args,
    )


if __name__ == "__main__":
    main()
