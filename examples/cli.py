"""LightningCLI: the same training from one YAML.

    python examples/cli.py fit --config configs/cli/landcover.yaml --data.batch_size 8
    python examples/cli.py test --config configs/cli/landcover.yaml --ckpt_path <checkpoint>
    python examples/cli.py fit --help

validate and predict likewise.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from rasteret_ml import RasteretDataModule


class RasteretCLI(LightningCLI):
    """Lightning's, with one `ignore_index` for data and model."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Say it once."""
        parser.link_arguments("data.ignore_index", "model.init_args.ignore_index")


def main(args: Any = None, *, run: bool = True) -> RasteretCLI:
    """Make what the arguments say (default the command line's), and run it."""
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
