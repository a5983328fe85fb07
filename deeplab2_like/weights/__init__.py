"""Importers of released weights, one module per model."""
