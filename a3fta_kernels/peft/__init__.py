"""A3FTA as a method of PEFT: importing this registers it.

    unet.add_adapter(A3FTAConfig(rank=16), adapter_name="style")

`config.py` is what PEFT is given and saves, `layer.py` the layer that it puts into the model, on
the same ops as `inject`'s, and `model.py` what finds the places. What PEFT then does with them
(choose, weight, switch off, merge, save, load) is PEFT's own.
"""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method

from .config import NAME, A3FTAConfig
from .layer import A3FTALinear
from .model import A3FTAModel

__all__ = ["A3FTAConfig", "A3FTALinear", "A3FTAModel"]


def _register() -> None:
    """Tells PEFT of the method. Its table of types is an enum, which Python lets no one extend:
    the member is made as the enum's own are, since PEFT compares, saves and looks up by it.
    """
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    register_peft_method(name=NAME.lower(), config_cls=A3FTAConfig, model_cls=A3FTAModel)


_register()
