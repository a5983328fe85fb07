"""For tools that look for a setup.py; everything is declared in pyproject.toml."""

import setuptools

setuptools.setup()
