"""The reference of all public names, from their docstrings, as HTML in build/docs.

python scripts/make_reference.py [--out build/docs]
"""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path

import pdoc

PAGES = ("", ".adapters", ".memory", ".ops", ".peft", ".processors", ".train")


def write(out: Path) -> None:
    """A page for each of PAGES, below a3fta_kernels, and an index."""
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        # types that are imported for the type checker alone stay as they are written, and a page
        # is asked for after the package that has it
        warnings.filterwarnings("ignore", message="Error parsing type annotation|The module spec")
        pages = [f"a3fta_kernels{page}" for page in PAGES]
        others = "|".join(rf"{re.escape(page)}$" for page in pages)
        pdoc.pdoc(*pages, rf"!(?!{others})", output_directory=out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    arguments = parser.parse_args()
    write(arguments.out)
    print(arguments.out / "index.html")
