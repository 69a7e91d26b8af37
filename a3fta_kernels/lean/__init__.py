"""The memory-lean frozen trunk: modules that keep less for the backward.

    exact       no matrix product is computed twice: convolutions keep no input, GroupNorm and
                SiLU are one op that keeps its input, as RMSNorm does, GEGLU keeps hidden and gate
    recompute   transformer blocks also compute q, k, v and the feed-forward's hidden layer again
    block       and rebuild the residual stream inside a block; attention is never computed twice
    compressed  exact, with what norms and activations keep in 8 bits
    off         the stock modules
    auto        of these, for each block, what fits into a budget and costs the least time

Gradients of exact, recompute and block are those of the stock model up to rounding; 8 bits are
close (`norms="int8"`, compressed). One file per kind of module; the table is RULES in rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checks import check_choice, describe
from ..forwards import check_forward
from ..memory.account import mib, parse_size
from ..memory.saved import ledger
from ..ops.validate import KEEPS
from ..tree import denoiser, plain_name
from ..whereabouts import is_wrapped
from .budget import Choose, fit
from .report import LeanReport
from .rules import RULES, Rule, rule_for, why_not
from .swapping import LEVELS, LeanModule, Settings, has_dropout, restore, swap

__all__ = ["LEVELS", "LeanReport", "lean"]


def lean(
    model: Any,
    level: str = "exact",
    *,
    norms: str = "input",
    levels: Mapping[str, str] | None = None,
    budget: int | str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> LeanReport:
    """Makes the frozen part of a model keep less memory for the backward.

    Args:
        model: a diffusers model, or a pipeline, whose denoiser is taken; after `inject` (or with
            PEFT's adapters), as what trains is left alone.
        level: off, exact, recompute, block, compressed or auto, as above. A second call replaces
            the first; "off" restores every class.
        norms: "input", or "int8": inputs of normalisations are kept in 8 bits (compressed implies
            it), with the first state of a block.
        levels: patterns (`re.search` in module names) with levels of their own; the first that
            matches decides. A transformer block decides for the modules inside it.
        budget: for "auto", the bytes that the forward may keep for its backward (the total of
            `memory.ledger`): a number, or "6GiB". `norms="int8"` allows 8 bits there.
        inputs: for "auto", keyword arguments of the model's forward of the size that training
            will have. Nothing is computed: the ledger runs on fake tensors.

    Returns:
        What became lean, and what was left alone and why.

    Nothing but the class of modules changes: parameters, names in state dicts, hooks and
    processors stay, so saving, `eject`, deep copies, checkpointing, DDP and PEFT go on as before.
    A module that is thawed later computes as its stock class does, and so does a block of which
    a module inside carries hooks. A model that changes between a forward and its backward
    (weights, adapters switched) is an error. `torch.func` is for the stock model. Under
    torch.compile, recompute and block are PyTorch's selective checkpointing of whole blocks, less
    attention; a block in which something drops, adapters too, is the stock one there in training.

    Raises:
        TypeError, ValueError: an unknown level, a pattern that matches nothing, a model of which
            nothing is known or everything trains, a budget below the least that can be. The
            model is unchanged then.
    """
    check_choice("level", level, (*LEVELS, "auto"))
    check_choice("norms", norms, KEEPS)
    if norms != "input" and level == "off":
        raise ValueError(f"norms: expected 'input' beside level 'off', got {norms!r}")
    root = denoiser(model)
    if any(is_wrapped(module) for module in root.modules()):
        raise ValueError(
            "model: expected one whose classes are its own, got one that fully_shard wrapped; "
            "lean first, then shard"
        )
    patterns = _check_levels(levels, root)
    limit = _check_budget(level, budget, inputs)
    if level != "off" and all(p.requires_grad for p in root.parameters()):
        raise ValueError(
            f"model: expected one whose trunk is frozen, got a {type(root).__name__} of which "
            f"every parameter trains; call inject first"
        )
    if limit is not None:
        return _auto(root, norms, patterns, limit, inputs or {})

    plan, left = _plan(root, _by_pattern(patterns, norms, lambda _: _settings(level, norms)))
    if not plan and (left or not any(rule_for(module) for module in root.modules())):
        raise ValueError(_nothing(root, left))
    _apply(root, plan)
    notes = ("nothing of this model keeps less at this level",)
    return _report(level, plan, left, () if plan or level == "off" else notes)


def _settings(level: str, norms: str) -> Settings:
    return Settings(level, "int8" if level == "compressed" else norms)


def _by_pattern(
    patterns: list[tuple[re.Pattern, str]], norms: str, otherwise: Choose
) -> Choose:  # fmt: skip
    """The settings of a module by its name: of the first pattern that matches, or `otherwise`."""

    def choose(name: str) -> Settings:
        own = next((level for pattern, level in patterns if pattern.search(name)), None)
        return otherwise(name) if own is None else _settings(own, norms)

    return choose


Planned = dict[str, tuple[nn.Module, Rule, Settings]]


def _apply(root: nn.Module, plan: Planned) -> None:
    """Makes the planned modules lean and every other stock, or changes nothing."""
    lean_now = [module for module in root.modules() if isinstance(module, LeanModule)]
    for module in [*(module for module, _, _ in plan.values()), *lean_now]:
        check_forward(module)
    planned = {id(module) for module, _, _ in plan.values()}
    for module in lean_now:
        if id(module) not in planned:
            restore(module)
    for module, rule, settings in plan.values():
        swap(module, rule.lean, settings)


def _report(
    level: str, plan: Planned, left: dict[str, str], notes: tuple[str, ...] = ()
) -> LeanReport:
    dropping = [n for n, (module, rule, _) in plan.items() if rule.is_block and has_dropout(module)]
    if dropping:
        notes += (
            f"{len(dropping)} blocks ({dropping[0]}) have dropout in more than adapters: in "
            f"training they are as they were",
        )
    return LeanReport(
        level,
        {name: settings for name, (_, _, settings) in plan.items()},
        {name: rule.stock.__name__ for name, (_, rule, _) in plan.items()},
        left,
        notes,
    )


def _auto(
    root: nn.Module, norms: str, patterns: list[tuple[re.Pattern, str]], limit: int,
    inputs: Mapping[str, Any],
) -> LeanReport:  # fmt: skip
    before = {
        name: (module, rule_for(module), module.settings)
        for name, module in root.named_modules()
        if isinstance(module, LeanModule)
    }
    left: dict[str, str] = {}

    def measure(choose: Choose) -> Any:
        plan, now_left = _plan(root, _by_pattern(patterns, norms, choose))
        left.clear()
        left.update(now_left)
        _apply(root, plan)
        return plan, ledger(root, **inputs)

    try:
        plan, found = fit(root, norms, limit, measure)
    except BaseException:
        _apply(root, before)  # type: ignore[arg-type]
        raise
    note = (
        f"{mib(found.total)} kept for the backward, {mib(limit - found.total)} under the budget "
        f"of {mib(limit)}"
    )
    return _report("auto", plan, left, (note,))


def _check_budget(level: str, budget: Any, inputs: Any) -> int | None:
    if level != "auto":
        for name, value in (("budget", budget), ("inputs", inputs)):
            if value is not None:
                raise ValueError(f"{name}: expected None beside level {level!r}, got {value!r:.60}")
        return None
    if inputs is None or not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs: expected the keyword arguments of the model's forward beside level 'auto', "
            f"got {describe(inputs)}"
        )
    if isinstance(budget, str):
        try:
            return parse_size(budget)
        except ValueError as error:
            raise ValueError(f"budget: {error}") from None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise TypeError(
            f"budget: expected bytes, or a size such as '6GiB', beside level 'auto', "
            f"got {describe(budget)}"
        )
    return budget


def _check_levels(levels: Any, root: nn.Module) -> list[tuple[re.Pattern, str]]:
    if levels is None:
        return []
    if not isinstance(levels, Mapping):
        raise TypeError(f"levels: expected a mapping of patterns to levels, got {describe(levels)}")
    names = [plain_name(name) for name, module in root.named_modules() if rule_for(module)]
    found = []
    for pattern, level in levels.items():
        check_choice(f"levels[{pattern!r}]", level, LEVELS)
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"levels: expected regular expressions, got {describe(pattern)}: {error}"
            ) from None
        if not any(compiled.search(name) for name in names):
            example = f" (such as {names[0]})" if names else ""
            raise ValueError(
                f"levels: expected patterns that match a module that lean knows{example}, "
                f"got {pattern!r}"
            )
        found.append((compiled, level))
    return found


def _plan(root: nn.Module, choose: Choose) -> tuple[Planned, dict[str, str]]:
    """The modules that become lean, and those that are left alone."""
    plan: Planned = {}
    left: dict[str, str] = {}
    blocks: dict[str, tuple[Settings, bool]] = {}  # settings, and whether it is in stages
    for full, module in root.named_modules():
        name = plain_name(full)
        rule = rule_for(module)
        if rule is None:
            continue
        around = next((b for n, b in blocks.items() if name.startswith(f"{n}.")), None)
        settings = around[0] if around else choose(name)
        acts = settings.level != "off" and rule.acts(settings)
        reason = why_not(rule, module) if acts else None
        if rule.is_block and around is None:
            blocks[name] = settings, acts and reason is None
        if not acts or (around is not None and around[1] and rule.in_stages):
            continue
        if reason is None:
            plan[name] = (module, rule, settings)
        else:
            left[name] = reason
    return plan, left


def _nothing(root: nn.Module, left: dict[str, str]) -> str:
    kinds = ", ".join(rule.stock.__name__ for rule in RULES)
    got = f"got a {type(root).__name__} with none"
    if left:
        name, reason = next(iter(left.items()))
        got = (
            f"got a {type(root).__name__} whose {len(left)} such modules stay as they are "
            f"({name}: {reason})"
        )
    return f"model: expected frozen modules that lean knows ({kinds}), {got}"
