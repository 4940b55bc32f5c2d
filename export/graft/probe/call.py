"""Finds how to call a module: tries expressions such as  model(ids, None)[0], or checks the one that the user gives.

An expression fits if its logits are those of a decoder: the last token changes only its own logits, one row does not
change another row, and two runs give the same logits.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from pastkey.errors import ContractError, InputError, first_line
from pastkey.quiet import quiet

from ...compare import LOGITS, logits_difference
from ..attention import embedding, failing_line, intercept, torch_attention
from .causes import Cause, Kind, NoCacheError
from .logits import is_distribution, logits_in, standing, tensors
from .observe import name_of, natively
from .watched import draws, in_training, kept

CONTRACT = "model(ids, position_ids=positions)"  # the contract's call: if it fits, PLAIN must give the same logits
PLAIN = "model(ids)"
# Candidates for arguments besides the ids, most likely first.
_ARGUMENTS = ("None", "ids", "positions", "0", "future", "past", "future_scores")
_BATCH, _LENGTHS = 2, (7, 5)
_ONE_ROW = "[:1]"  # of the ids, in a call that accepts a batch of one row only
_SEEDS = 64  # tried on a module that draws random numbers


def _future(ids: Tensor) -> Tensor:
    """(T, T), True where the column's token is later than the row's token."""
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)


_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda ids: torch.arange(ids.shape[1]).expand_as(ids),
    "past": lambda ids: ~_future(ids),
    "future": _future,
    "future_scores": lambda ids: torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(_future(ids), -torch.inf),
}


@dataclass(frozen=True)
class Call:
    """An expression over `model` and `ids` (B, T), and the layout of the logits in its result.

    The expression may also use positions (B, T), counted from 0; past (T, T), True for visible tokens; future (T, T),
    its complement; future_scores (T, T), -inf in the future and 0 elsewhere; and torch.
    """

    expression: str
    order: str = "btv"  # the axes of the logits: "btv", "tbv", "tv", ...; no t if only the last position is returned

    def raw(self, module: nn.Module, ids: Tensor) -> Any:
        """The result of the expression."""
        known = {"model": module, "ids": ids.contiguous(), "torch": torch}
        known |= {name: make(ids) for name, make in _NAMED.items() if name in self.expression}
        with natively(module):
            return eval(self.expression, {"__builtins__": {"float": float, "int": int, "len": len}}, known)

    def __call__(self, module: nn.Module, ids: Tensor) -> Tensor:
        """(1, T) -> logits (1, T, V), or (1, 1, V) of the last position."""
        logits: Tensor = self.raw(module, ids)
        if self.order == "tbv":
            return logits.transpose(0, 1)
        if logits.dim() == 1 or (logits.dim() == 2 and "t" in self.order):  # some modules squeeze a batch of one
            logits = logits.unsqueeze(0)
        return logits if logits.dim() == 3 else logits.unsqueeze(1)


_PLAIN = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.keyword,
    ast.UnaryOp, ast.USub, ast.Attribute, ast.Call,
)  # fmt: skip


_METHODS = ("log", "clamp_min", "transpose")  # of a result, which messages propose


def is_plain(expression: str) -> bool:
    """Whether an expression only calls the module; an untrusted manifest may ask for nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(
        isinstance(node, _PLAIN)
        and not (isinstance(node, ast.Call) and not _calls_module(node.func))
        and not (isinstance(node, ast.Name) and node.id == "torch")
        and not (isinstance(node, ast.Attribute) and node.attr.startswith("_"))
        for node in nodes
    )


def _calls_module(function: ast.expr) -> bool:
    """Whether a function is the module, or a harmless method of its result."""
    if not isinstance(function, ast.Attribute):
        return isinstance(function, ast.Name) and function.id == "model"
    result = function.value
    while isinstance(result, ast.Subscript | ast.Attribute):
        result = result.value
    return function.attr in _METHODS and isinstance(result, ast.Call)


@dataclass(frozen=True)
class Probed:
    """A call that returns logits, and the facts that its runs showed."""

    call: Call
    vocab_size: int
    breaches: tuple[Cause, ...] = ()  # why its logits are not a decoder's
    wide: bool = True  # whether they have the width of the vocabulary that is embedded


def find_call(module: nn.Module, context_length: int, asked: str | None) -> Probed:
    """Finds the call that fits by trying; if none fits, returns the first call that returns logits, with its breaches.

    Raises ContractError if no call returns logits, InputError if two that fit differ in their logits or `asked` fails.
    """
    expressions, targets = ([asked], []) if asked is not None else (_expressions(module), _with_targets(module))
    flagged = [] if asked is not None else _flagged(module, PLAIN if PLAIN in expressions else expressions[0])
    fitting: list[tuple[Probed, Tensor]] = []
    failed: list[tuple[str, BaseException]] = []
    breached: list[Probed] = []
    for expression in (*expressions, *flagged):
        if expression in flagged and any(probed.wide for probed, _ in fitting):
            break
        if expression in targets and any(probed.call.expression.startswith(PLAIN) for probed in breached):
            continue  # targets add the logits of every position, but repair no breach
        if "ids[0]" in expression and any(_looks_ahead_alone(probed) for probed in breached):
            continue  # it accepts rows; along other axes of one row it computes another model
        try:
            found = _probe(module, expression, context_length)
        except Exception as error:  # a user's module may raise anything
            failed.append((expression, error))
            continue
        if not found:
            failed.append((expression, ContractError("it gives no logits (B, T, V), (B, V) or without B")))
            continue
        fits = [entry for entry in found if not entry[0].breaches]
        fitting += fits
        if not fits:
            breached += [probed for probed, _ in found]
        elif (
            fitting[0][0].call.order.count("t")
            and (expression == CONTRACT or not _asks(module))
            and (fitting[0][0].wide or not flagged)
        ):
            break
    if breached and Kind.ROWS in _kinds(breached[0]):  # perhaps its first axis holds the tokens
        breached.sort(key=lambda probed: "(ids.T" not in probed.call.expression or _kinds(probed) != {Kind.LOOK_AHEAD})
    looks_ahead = bool(breached) and Kind.LOOK_AHEAD in _kinds(breached[0])
    others: list[str] = []
    if not fitting and looks_ahead and asked is None:  # the caller may have to pass a mask
        others = _masked(module, "ids.T" if "(ids.T" in breached[0].call.expression else "ids")
    elif not fitting and asked is None and all("(ids.T" in probed.call.expression for probed in breached):
        # It may accept only one row at a time.
        others = [_of_one_row(expression) for expression in expressions if "ids[" not in expression]
    for expression in others:
        with contextlib.suppress(Exception):  # a user's module may raise anything
            fitting += [entry for entry in _probe(module, expression, context_length) if not entry[0].breaches]
    if fitting:
        return _chosen(module, fitting)
    if breached:
        return breached[0]
    expression, cause = failed[0]
    if (mended := _mended(module, expressions, context_length)) is not None:
        raise InputError(
            f"{name_of(module)} returns logits, but not as (B, T, V) or (B, V), one row per text: give their call "
            f"with  --call {shlex.quote(mended)}"
        )
    where = failing_line(cause)
    if not isinstance(cause, ContractError) and _runs(module, expression, context_length):
        what = f"accepts only {context_length} tokens, the whole context, and no fewer ({first_line(cause)})"
        raise NoCacheError(name_of(module), [Cause(Kind.FIXED, what, where or "")]) from cause
    told = f"{type(cause).__name__}: {first_line(cause)}" if not isinstance(cause, ContractError) else first_line(cause)
    advice = 'give its call as an expression over model and ids (B, T), e.g. --call "model(ids, None)[0]"'
    message = f"{name_of(module)} could not be run as {expression}{f' at {where}' if where else ''}: {told}; {advice}"
    raise (InputError if asked is not None else ContractError)(message) from cause


# These make (B, T, V) of (B, V, T), (V, T), and of the logits of several next tokens: (B, T, n, V), (B, n, T, V), ...
_LAID = (".transpose(1, 2)", ".T", "[:, :, 0]", "[:, 0]", "[0]")


def _mended(module: nn.Module, expressions: Sequence[str], context_length: int) -> str | None:
    """A call with the axes of its logits put in order; None if that does not make a decoder's of them."""
    ids = torch.zeros(_BATCH, _LENGTHS[1], dtype=torch.long)
    for expression in expressions:
        with contextlib.suppress(Exception):  # a user's module may raise anything
            for (path, _), laid in itertools.product([*tensors(_run(Call(expression), module, ids))], _LAID):
                with contextlib.suppress(Exception):  # it has other axes
                    found = _probe(module, expression + path + laid, context_length)
                    if any(probed.wide and not probed.breaches for probed, _ in found):
                        return expression + path + laid
    return None


def _kinds(probed: Probed) -> set[Kind]:
    return {cause.kind for cause in probed.breaches}


def _looks_ahead_alone(probed: Probed) -> bool:
    """Whether it accepts several rows, and computes each right except for later tokens."""
    return probed.call.order == "btv" and _kinds(probed) == {Kind.LOOK_AHEAD}


def _runs(module: nn.Module, expression: str, length: int) -> bool:
    with contextlib.suppress(Exception):  # a user's module may raise anything
        _run(Call(expression), module, torch.zeros(_BATCH, length, dtype=torch.long))
        return True
    return False


def _chosen(module: nn.Module, fitting: Sequence[tuple[Probed, Tensor]]) -> Probed:
    """The call whose logits all others have. Raises InputError if there are others, or only probabilities."""
    kinds: list[list[tuple[Probed, Tensor]]] = []  # of equal logits
    for probed, logits in fitting:
        if not is_distribution(logits):
            alike = next((kind for kind in kinds if _same_tokens(logits, kind[0][1])), None)
            kinds.append([(probed, logits)]) if alike is None else alike.append((probed, logits))
    if not kinds:
        _refuse_probabilities(module, *fitting[0])
    taken = [next((p for p, _ in kind if "t" in p.call.order), kind[0][0]) for kind in kinds]
    if len(taken) > 1:
        refuse_ambiguous(module, *(probed.call for probed in taken))
    return taken[0]


def _same_tokens(one: Tensor, other: Tensor) -> bool:
    """Whether logits (V,) give the same probabilities: a number that is added to all of them changes none."""
    return one.shape == other.shape and _close(one - one.mean(), other - other.mean())


def refuse_ambiguous(module: nn.Module, *calls: Call) -> NoReturn:
    """Raises InputError for calls that fit and give different logits: the user must choose one."""
    expressions = [call.expression for call in calls]
    cause = ContractError(f"{' and '.join(expressions)} give different logits")  # verify shows this
    raise InputError(
        f"{name_of(module)} runs as {' and as '.join(expressions)}, which return different logits: choose one with  "
        + "  or  ".join(f"--call {shlex.quote(expression)}" for expression in reversed(expressions))
    ) from cause


def _refuse_probabilities(module: nn.Module, probed: Probed, last: Tensor) -> NoReturn:
    expression = probed.call.expression
    mended = f"{expression}.log()" if bool(last.all()) else f"{expression}.clamp_min(1e-30).log()"
    raise InputError(
        f"{name_of(module)} returns probabilities as {expression} (each row sums to 1), and a sampler expects "
        f"logits: compute their logarithm with  --call {shlex.quote(mended)}"
    )


def plain_call(module: nn.Module, context_length: int) -> Call | None:
    """The call without optional arguments; None if it fails or its logits are not a decoder's."""
    with contextlib.suppress(Exception):  # a user's module may raise anything
        found = [entry for entry in _probe(module, PLAIN, context_length) if not entry[0].breaches]
        return _chosen(module, found).call
    return None


def _asks(module: nn.Module) -> bool:
    """Whether forward has required arguments besides the ids."""
    return bool(_parameters(module)[1])


# Candidates for a required argument by a part of its name; all other names get _ARGUMENTS.
_BY_NAME = {
    "logits": ("True", "0"),
    "start": ("0",),
    "pos": ("positions", "positions[0]", "0"),
    "target": ("ids", "None"),
    "label": ("ids", "None"),
    "mask": ("future_scores", "future", "past", "None"),
}


def _candidates(name: str) -> tuple[str, ...]:
    return next((found for part, found in _BY_NAME.items() if part in name.lower()), _ARGUMENTS)


def _parameters(module: nn.Module) -> tuple[list[inspect.Parameter], int]:
    """The positional parameters of forward after the first, and how many of them are required."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return [], 0
    usable = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    return usable, sum(p.default is p.empty for p in usable)


def _expressions(module: nn.Module) -> list[str]:
    others, required = _parameters(module)
    names = [p.name for p in others]
    found = []
    if "position_ids" in names:
        found.append(CONTRACT)
    if not required:
        found += [PLAIN, *_with_targets(module)]
    else:
        choices = list(itertools.product(*(_candidates(name) for name in names[: min(required, 3)])))
        extra = ", 0" * (required - 3)
        found += [f"model(ids, {', '.join(choice)}{extra})" for choice in choices]
    for form in ("ids[0]", "ids.T"):
        found.append((found[0] if required else PLAIN).replace("(ids", f"({form}", 1))
    return found


def _with_targets(module: nn.Module) -> list[str]:
    """The call with optional targets: many modules return the logits of every position only with targets."""
    others, required = _parameters(module)
    if required or not others:
        return []
    first, *more = (p.name for p in others)
    named = next((name for name in more if _candidates(name)[0] == "ids"), None)
    if named is not None and _candidates(first)[0] != "ids":
        return [f"model(ids, {named}=ids)"]
    return ["model(ids, ids)"] if _candidates(first) is _ARGUMENTS or _candidates(first)[0] == "ids" else []


def _flagged(module: nn.Module, call: str) -> list[str]:
    """The call with each flag turned over that may ask for logits, such as get_logits=False."""
    with contextlib.suppress(TypeError, ValueError):
        flags = [p for p in inspect.signature(module.forward).parameters.values() if "logits" in p.name.lower()]
        return [f"{call[:-1]}, {p.name}={not p.default})" for p in flags if p.default in (None, False, True)]
    return []


def _masked(module: nn.Module, ids: str) -> list[str]:
    names = [p.name for p in _parameters(module)[0] if p.default is not p.empty]
    return [f"model({ids}, {name}={mask})" for name in names for mask in ("future_scores", "future", "past")]


def _of_one_row(expression: str) -> str:
    return re.sub(r"\b(ids|positions)\b(?! *=)", rf"\1{_ONE_ROW}", expression)


# --- one expression -----------------------------------------------------------------------------------------------
def _probe(module: nn.Module, expression: str, context_length: int) -> list[tuple[Probed, Tensor]]:
    """Each part of the result that may be the logits, with its numbers (V,) at the last position."""
    lengths = tuple(max(1, min(n, context_length - i)) for i, n in enumerate(_LENGTHS))
    vocab = _embedded(module, expression, lengths[1])
    ids = torch.randint(0, vocab, (_BATCH, lengths[0]), generator=torch.Generator().manual_seed(0))
    outputs = [[*tensors(_run(Call(expression), module, part))] for part in (ids, ids[:, : lengths[1]])]
    alone = f"ids{_ONE_ROW}" in expression
    batch, one_row = 1 if alone else _BATCH, alone or "ids[0]" in expression
    found = []
    for path, order in logits_in(outputs, lengths, batch, one_row, vocab):
        call = Call(expression + path, order)
        whole = standing(_run(call, module, ids), order)  # (B, T, V) or (B, 1, V)
        breaches = _breaches(module, call, ids, whole, order, vocab)
        size = int(whole.shape[-1])
        found.append((Probed(call, size, breaches, wide=size == vocab), whole[0, -1]))
    return found


def _run(call: Call, module: nn.Module, ids: Tensor, seed: int = 0) -> Any:
    _seed(seed)  # only the comparison of seeds may show randomness
    with torch.no_grad(), quiet(), intercept(torch_attention):
        return call.raw(module, ids)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _draws(run: Callable[[], object]) -> bool:
    """Whether a run draws random numbers from torch, Python or numpy."""

    def states() -> tuple[object, ...]:
        _, numbers, place, *_ = np.random.get_state()
        return torch.default_generator.get_state().tolist(), random.getstate(), list(numbers), place

    run()
    after = states()
    _seed(0)
    return after != states()


def _embedded(module: nn.Module, expression: str, length: int) -> int:
    """How many tokens the module embeds: the rows of the table that the ids index; 2 if there is none."""
    ids = torch.zeros(_BATCH, length, dtype=torch.long)
    with torch.no_grad(), quiet(), embedding(ids) as rows:
        Call(expression).raw(module, ids)
    return min(rows, default=2)


def _breaches(module: nn.Module, call: Call, ids: Tensor, logits: Tensor, order: str, vocab: int) -> tuple[Cause, ...]:
    """How the logits differ from a decoder's; empty for a decoder."""

    def run(given: Tensor, seed: int = 0) -> Tensor:
        return standing(_run(call, module, given, seed), order)

    found: list[Cause] = []
    if not bool(torch.isfinite(logits).all()):
        return (Cause(Kind.UNKNOWN, "gives NaN or infinity in its logits: check its weights and masks"),)
    if not torch.equal(run(ids), run(ids)):
        return tuple(kept(module, lambda: run(ids)))
    logits = run(ids)
    seeds = range(1, _SEEDS if _draws(lambda: run(ids)) else 2)  # e.g. a layer that is skipped once in a hundred runs
    if any(not torch.equal(logits, run(ids, seed)) for seed in seeds):
        found += draws(lambda: run(ids))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % vocab
    other = run(changed)
    if logits.shape[1] > 1 and not _close(other[:, :-1], logits[:, :-1]):
        found.append(Cause(Kind.LOOK_AHEAD, "gives earlier tokens other logits when a later token changes"))
    if logits.shape[0] > 1:
        for row in (0, 1):
            changed = ids.clone()
            changed[row] = (ids[row] + 1) % vocab
            if not _close(run(changed)[1 - row], logits[1 - row]):
                found.append(Cause(Kind.ROWS, "gives one row other logits when another row of the batch changes"))
                break
    if vocab > 1 and torch.equal(other[:, -1], logits[:, -1]):
        found.append(Cause(Kind.UNKNOWN, "gives the last token the same logits whatever that token is"))
    return tuple((found and in_training(module)) or found)


def _close(a: Tensor, b: Tensor) -> bool:
    return logits_difference(b, a) <= LOGITS
