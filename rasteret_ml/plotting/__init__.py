"""Pictures of chips, series and footprints."""
