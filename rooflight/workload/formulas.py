"""Formulas: the same model walked with symbolic sizes, so that its FLOPs come out as an expression of them.

B sequences · T new tokens a sequence · S context · L layers · D width · H heads · K key heads · E head dim ·
F feed-forward width · V vocabulary; what else a model fixes (experts, ranks, windows) stays a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max

from rooflight.models.config import ModelConfig
from rooflight.workload import program as programs
from rooflight.workload import walk as walks
from rooflight.workload.rows import component_of

LEGEND = {
    "B": "sequences",
    "T": "tokens a sequence",
    "S": "context",
    "L": "layers",
    "D": "width",
    "H": "query heads",
    "K": "key heads",
    "E": "head dimension",
    "F": "feed-forward width",
    "V": "vocabulary",
    "Δ(n)": "n(n+1)/2, and 0 below n = 0",
}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Symbols:
    """Named sizes as torch's symbolic integers, and the way back from torch's names to ours."""

    def __init__(self) -> None:
        self.env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}

    def size(self, name: str, hint: int) -> Any:
        source = ConstantSource(name)
        symbol: Any = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        self.names[symbol] = sympy.Symbol(name, positive=True, integer=True)
        return self.env.create_symintnode(symbol, hint=hint, source=source)

    def expression(self, count: Any) -> sympy.Expr:
        node = getattr(count, "node", None)
        return sympy.sympify(count if node is None else node.expr).xreplace(self.names)


def _symbolic(config: ModelConfig, setting: programs.Setting, symbols: _Symbols) -> tuple[ModelConfig, Any]:
    # Sizes of one must not look like one: torch would take an axis of size one for a broadcast.
    sizes = {
        "vocab_size": symbols.size("V", max(config.vocab_size, 2)),
        "width": symbols.size("D", max(config.width, 2)),
        "heads": symbols.size("H", max(config.heads, 2)),
        "kv_heads": symbols.size("K", max(config.kv_heads, 2)),
        "ffn_width": symbols.size("F", max(config.ffn_width, 2)),
    }
    if config.latent is None:
        sizes["head_dim"] = symbols.size("E", config.head_dim)
    named = replace(config, attention_scale=config.scale, **sizes)
    context = symbols.size("S" if setting.phase == "decode" else "T", max(setting.context, 3))
    return named, replace(setting, batch=symbols.size("B", max(setting.batch, 3)), context=context)


@dataclass(frozen=True, slots=True)
class Term:
    """FLOPs of one record, or of one part of a fused one, over the whole model."""

    component: str
    op: str
    primitive: str
    flops: sympy.Expr


def terms(config: ModelConfig, setting: programs.Setting) -> list[Term]:
    """Every record's FLOPs as expressions of the sizes in LEGEND, the optimizer's left out.

    The optimizer walks parameters, not tokens: its work is a multiple of the parameter count.
    """
    symbols = _Symbols()
    folded, counts = config.folded()
    named, symbolic = _symbolic(folded, replace(setting, text=None, optimizer="none"), symbols)
    walk = walks.dry(lambda: _one_each(named, symbolic), symbols.env)
    repeats: list[Any] = list(counts)
    if len(counts) == 2:
        # One kind of layer, the first of them apart: then their number is a symbol too.
        repeats = [sympy.Integer(1), sympy.Symbol("L", positive=True, integer=True) - 1]
    found = []
    for record in walk.trace.records:
        layer = walks.layer_of(record.path)
        repeat = repeats[layer] if layer is not None else 1
        pieces = [(part.component or component_of(record), part.flops) for part in record.cost.parts] or [
            (component_of(record), record.cost.flops)
        ]
        for component, flops in pieces:
            whole = sum((symbols.expression(count) * repeat for count in flops.values()), sympy.Integer(0))
            found.append(Term(component, record.name, str(record.cost.primitive), whole))
    return found


def grouped(found: list[Term], by: str) -> dict[str, str]:
    """Written formulas of the terms summed by `component`, `op` or `primitive`; a sum of zero is left out."""
    sums: dict[str, sympy.Expr] = {}
    for term in found:
        key = getattr(term, by)
        sums[key] = sums.get(key, sympy.Integer(0)) + term.flops
    return {key: write(expression) for key, expression in sums.items() if expression != 0}


def component_formulas(config: ModelConfig, setting: programs.Setting) -> dict[str, str]:
    """FLOPs of each report component as formulas of the sizes in LEGEND."""
    return grouped(terms(config, setting), "component")


def _one_each(config: ModelConfig, setting: programs.Setting) -> programs.Program:
    """The program with each distinct layer once; how often it repeats is multiplied in afterwards."""
    ones = tuple(1 for _ in config.layers)
    if setting.phase == "train":
        program = programs.training(config, setting, "cpu", ones)
    else:
        program = programs.inference(config, setting, "cpu", ones)
    program.order = tuple(range(len(ones)))
    return program


def _plain_division(numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """Floor divisions as mathematics: n(n+1)/2 is whole anyway; a context in blocks is rounded up."""
    beyond = list(numerator.atoms(Max))
    if divisor == 2 and len(beyond) == 1:
        inner = next(arg for arg in beyond[0].args if arg != 0)
        return sympy.Symbol(f"Δ({sympy.sstr(inner).replace(' ', '')})", positive=True)
    if divisor == 2:
        return numerator / 2
    return sympy.Symbol(f"⌈{sympy.sstr(numerator - divisor + 1)}/{divisor}⌉", positive=True)


def write(expression: sympy.Expr) -> str:
    """An expression as people write it: 2·B·T·D·E·(H + 2·K). Δ(n) stands for n(n+1)/2, nothing below zero."""
    expression = cast(sympy.Expr, expression.replace(FloorDiv, _plain_division))
    factored: Any = sympy.factor(sympy.expand(expression))
    factored = sympy.factor_terms(factored)
    text = sympy.sstr(factored, order="grlex")
    text = re.sub(r"\*\*(\d+)", lambda match: match.group(1).translate(_SUPERSCRIPTS), text)
    return text.replace("*", "·")
