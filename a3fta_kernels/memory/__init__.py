"""Where training memory goes, found on fake tensors: seconds, and no GPU.

`ledger`: the bytes that a forward saves for its backward, by module, operator and tensor.
`step_peak`: the most bytes that live at once in a whole step. `models`: real architectures by name.
`plan`: which batch, level and precision fit into a memory.
"""

from __future__ import annotations

from .account import Entry, Ledger
from .peak import Peak, step_peak
from .saved import ledger

__all__ = ["Entry", "Ledger", "Peak", "ledger", "step_peak"]
