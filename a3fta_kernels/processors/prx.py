"""PRX: the image's queries attend to text and image; attention goes to `attention.to_out[0]`."""

from __future__ import annotations

from .clock import share
from .family import Family

FAMILY = Family("prx", ("PRXBlock",), share)
