"""Packages are found, not listed; the experiment notebooks are part of the package, so that `medvl run` works after `pip install medvl`. All else stands in pyproject.toml."""
from setuptools import find_packages, setup

setup(packages=[*find_packages(include=['medvl', 'medvl.*']), 'medvl.experiments'], package_dir={'medvl.experiments': 'nbs/experiments'})
