"""Parameter names of foreign checkpoints, as a table that reads in both directions.

A rule pairs the name a checkpoint uses with the name our module uses. Names are templates: ``{i}``
stands for a number, ``{p:weight|bias}`` for one of the listed words, and the same field on the
other side repeats what was found:

    Rule("down_blocks.{i}.{j}.conv1.{p:weight|bias}", "encoder.stages.{i}.{j}.conv1.{p}")

A tuple on one side is a tensor kept in parts there and fused on the other side. Parts are stacked
along dim 0 in the order of the tuple, and are equal in size:

    Rule(("to_q.weight", "to_k.weight", "to_v.weight"), "qkv.weight")         # fused here
    Rule("cross_attn.kv_linear.weight", ("cross.k.weight", "cross.v.weight"))  # split here

Further options: ``ours=None`` drops a key (a buffer that we compute), ``ranks=(2, 4)`` stores a
linear layer of the checkpoint as a 1×1 convolution (and back), ``optional=True`` lets a key be
absent from the checkpoint.

    ours    = translate(checkpoint, RULES, expected=model.state_dict())
    foreign = untranslate(model.state_dict(), RULES)

Both fail with one error that names every unmatched, doubled, incomplete, missing or mis-shaped key.
Tensors on the meta device work, so a table can be checked against a published list of names
without any memory.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gesso_core.errors import WeightsError

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@dataclass(frozen=True)
class Rule:
    """One row of a key table: ``foreign`` name(s) on the left, ``ours`` on the right."""

    foreign: str | tuple[str, ...]
    ours: str | tuple[str, ...] | None
    ranks: tuple[int, int] | None = None  # (rank in the checkpoint, rank in our module)
    optional: bool = False

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Both sides as tuples; a dropped key has an empty right side."""
        return _as_tuple(self.foreign), _as_tuple(self.ours)


KeyMap = Sequence[Rule]


@dataclass(frozen=True)
class _Row:
    """A rule seen in one direction."""

    sources: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]
    names: tuple[str, ...]
    rank: int | None
    optional: bool


@dataclass
class _Problems:
    """Everything wrong with a state dict, gathered so that it can be told at once."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, key: str) -> None:
        self.found[kind].append(key)

    def raise_if_any(self) -> None:
        if self.found:
            lines = [f"  {kind}: {', '.join(sorted(keys))}" for kind, keys in self.found.items()]
            raise WeightsError(
                "the weights do not fit the model:\n"
                + "\n".join(lines)
                + "\nCheck that the file belongs to this model and to this layout of names."
            )


def translate(
    state: Mapping[str, Tensor], rules: KeyMap, expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to our names.

    Args:
        state: tensors under the checkpoint's names.
        rules: the table of that layout.
        expected: our module's ``state_dict()`` (meta tensors will do); when given, names and
            shapes must agree.

    Raises:
        WeightsError: naming every unmatched, doubled, incomplete, missing or mis-shaped key.
    """
    problems = _Problems()
    renamed = _apply(state, _rows(rules, backwards=False), problems)
    if expected is not None:
        _compare(renamed, expected, _optional_names(rules), problems)
    problems.raise_if_any()
    return renamed


def untranslate(state: Mapping[str, Tensor], rules: KeyMap) -> dict[str, Tensor]:
    """The inverse of `translate`: our names back to the checkpoint's. Dropped keys stay away."""
    problems = _Problems()
    renamed = _apply(state, _rows(rules, backwards=True), problems)
    problems.raise_if_any()
    return renamed


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def _rows(rules: KeyMap, *, backwards: bool) -> list[_Row]:
    rows = []
    for rule in rules:
        foreign, ours = rule.sides()
        if len(foreign) > 1 and len(ours) > 1:
            raise ValueError(f"only one side of a rule may have parts: {rule}")
        words = dict(_words((*foreign, *ours)))
        source, target = (ours, foreign) if backwards else (foreign, ours)
        if not source:
            continue
        rank = rule.ranks and rule.ranks[0 if backwards else 1]
        patterns = tuple(_pattern(name, words) for name in source)
        plain = tuple(_FIELD.sub(r"{\1}", name) for name in target)
        rows.append(_Row(patterns, plain, source, rank, rule.optional))
    return rows


def _words(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        for match in _FIELD.finditer(name):
            if match[2]:
                yield match[1], match[2]


def _pattern(template: str, words: Mapping[str, str]) -> re.Pattern[str]:
    """``blocks.{i}.{p}`` as a regular expression with one named group per field."""
    pieces, end, seen = [], 0, set()
    for match in _FIELD.finditer(template):
        name = match[1]
        group = f"(?P={name})" if name in seen else f"(?P<{name}>{words.get(name, '[0-9]+')})"
        pieces += [re.escape(template[end : match.start()]), group]
        end = match.end()
        seen.add(name)
    return re.compile("".join([*pieces, re.escape(template[end:])]))


def _apply(
    state: Mapping[str, Tensor], rows: Sequence[_Row], problems: _Problems
) -> dict[str, Tensor]:
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        hits = [
            (number, part, tuple(sorted(match.groupdict().items())))
            for number, row in enumerate(rows)
            for part, pattern in enumerate(row.sources)
            if (match := pattern.fullmatch(key))
        ]
        if len(hits) != 1:
            problems.add("matched by two rules" if hits else "unknown", key)
            continue
        number, part, fields = hits[0]
        groups[number, fields][part] = tensor

    renamed: dict[str, Tensor] = {}
    for (number, fields), parts in groups.items():
        for key, tensor in _emit(rows[number], dict(fields), parts, problems):
            if key in renamed:
                problems.add("given twice", key)
            renamed[key] = tensor
    return renamed


def _emit(
    row: _Row, fields: dict[str, str], parts: Mapping[int, Tensor], problems: _Problems
) -> Iterable[tuple[str, Tensor]]:
    """The renamed tensors of one group of parts that belong together."""
    absent = [name for part, name in enumerate(row.names) if part not in parts]
    if absent:
        for name in absent:
            problems.add("missing", _FIELD.sub(r"{\1}", name).format(**fields))
        return
    targets = [target.format(**fields) for target in row.targets]
    tensors = [parts[part] for part in range(len(row.names))]
    if len(tensors) > 1:
        if len({tensor.shape for tensor in tensors}) > 1:
            problems.add("parts of unequal shape", targets[0])
            return
        tensors = [torch.cat(tensors)]
    if len(targets) > 1:
        if tensors[0].shape[0] % len(targets):
            problems.add(f"not divisible by {len(targets)}", row.names[0].format(**fields))
            return
        tensors = [part.clone() for part in tensors[0].chunk(len(targets))]
    for key, tensor in zip(targets, tensors, strict=False):
        yield key, tensor if row.rank is None else _with_rank(tensor, row.rank, key, problems)


def _with_rank(tensor: Tensor, rank: int, key: str, problems: _Problems) -> Tensor:
    """[O, I] as [O, I, 1, 1] or back."""
    extra = tensor.shape[rank:]
    if any(size != 1 for size in extra):
        problems.add("mis-shaped", f"{key} {list(tensor.shape)}, expected rank {rank}")
        return tensor
    kept = tensor.shape[:rank]
    return tensor.reshape(*kept, *[1] * (rank - len(kept)))


def _optional_names(rules: KeyMap) -> list[re.Pattern[str]]:
    return [
        _pattern(name, dict(_words(rule.sides()[0] + rule.sides()[1])))
        for rule in rules
        if rule.optional
        for name in rule.sides()[1]
    ]


def _compare(
    renamed: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    optional: Sequence[re.Pattern[str]],
    problems: _Problems,
) -> None:
    for key, tensor in expected.items():
        if key not in renamed:
            if not any(pattern.fullmatch(key) for pattern in optional):
                problems.add("missing", key)
        elif renamed[key].shape != tensor.shape:
            given, wanted = list(renamed[key].shape), list(tensor.shape)
            problems.add("mis-shaped", f"{key} {given}, expected {wanted}")
    for key in renamed.keys() - expected.keys():
        problems.add("not in the model", key)
