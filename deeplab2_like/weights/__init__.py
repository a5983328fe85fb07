"""Importers of released checkpoints, one file per source."""
