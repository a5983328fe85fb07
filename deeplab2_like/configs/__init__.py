"""Configs: the schema, the loader, and one folder of YAML files per system."""

from deeplab2_like.configs.loader import list_configs, load_config, save_config
from deeplab2_like.configs.schema import Config, StrictModel

__all__ = ["Config", "StrictModel", "list_configs", "load_config", "save_config"]
