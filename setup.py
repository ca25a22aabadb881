"""The package list, computed: an unlisted subpackage would import when editable and be missing from the wheel."""

from setuptools import find_packages, setup

FOLDERS = ("arch", "models", "compiler", "hw", "sim", "boards", "sw", "reports")

setup(
    packages=[
        "weft",
        *(f"weft.{top}" for top in FOLDERS),
        *(f"weft.{top}.{sub}" for top in FOLDERS for sub in find_packages(top)),
    ],
    package_dir={"weft": "weft", **{f"weft.{top}": top for top in FOLDERS}},
)
