"""The packages of the distribution; everything else is in pyproject.toml.

The folder kernels/ of the checkout is installed as `freqformer.kernels`: on its own, `kernels`
would clash with a distribution of that name.
"""

from setuptools import find_packages, setup

setup(
  packages=[
    *find_packages(include=["freqformer", "freqformer.*"]),
    *(f"freqformer.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
  ],
  package_dir={"freqformer.kernels": "kernels"},
)
