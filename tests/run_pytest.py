"""Runs pytest on the files that are given; the main program of the tests in `BUILD`."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
