"""Rewriting one file with libcst: imports, constructor calls and paths, everything else as it was."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider

from .. import KEPT, PACKAGE
from ..table import OldName, load
from .calls import NEW_CLASS, Argument, NewArgument, Undecided, rewritten
from .uses import below_package, is_old_module, is_real_name, only_listed

_OLD_OF_OWN = {"DilatedAttention": "dilated_attention", "MultiheadDilatedAttention": "dilated_attention"}
"""Names that the old package had at its top, as this one has: the module that says which arguments they took."""


@dataclass
class Findings:
    """What was changed in a file and what a person has to decide: (line, text)."""

    changed: list[tuple[int, str]] = field(default_factory=list)
    left: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class _Name:
    """An old name as a file knows it."""

    local: str
    entry: OldName
    line: int
    calls: dict[int, list[NewArgument]] = field(default_factory=dict)
    reasons: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    mentions: int = 0
    own: bool = False
    """A class that the package has today, which old code calls with arguments of before."""

    @property
    def decided(self) -> bool:
        return not self.reasons and self.mentions > 0


def rewrite(source: bytes) -> tuple[bytes, Findings]:
    """The source with new names, and what was found.

    Raises:
        libcst.ParserSyntaxError: the source does not parse.
    """
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    collector = _Collector(wrapper)
    wrapper.visit(collector)
    findings = Findings(left=only_listed(source))
    if not collector.names and not collector.modules and not collector.others and not collector.has_unknown:
        return source, findings
    for name in (name for names in collector.names.values() for name in names):
        if name.own:
            findings.left += name.reasons
            findings.changed += name.dropped
            continue
        for line, text in name.reasons or (
            [] if name.decided else [(name.line, f"{name.entry.name} is not used here")]
        ):
            findings.left.append((line, f"{text}; kept as {KEPT}"))
        if name.decided:
            findings.changed.append((name.line, f"{name.entry.name} -> {NEW_CLASS[name.entry.kind]}"))
            findings.changed += name.dropped
    findings.left += [(line, f"{text}; kept as {KEPT}") for line, text in collector.others]
    result = wrapper.module.visit(_Rewriter(collector))
    findings.left.sort()
    findings.changed.sort()
    return result.bytes, findings


def dotted(node: cst.BaseExpression | None) -> str:
    """``a.b.c`` of names and attributes, "" of anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr.value}"
    return ""


def dotted_node(text: str) -> cst.Name | cst.Attribute:
    """The expression of ``a.b.c``."""
    head, *rest = text.split(".")
    node: cst.Name | cst.Attribute = cst.Name(head)
    for part in rest:
        node = cst.Attribute(node, cst.Name(part))
    return node


class _Collector(cst.CSTVisitor):
    """First pass: old names of the file, and every place where one is mentioned."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self, wrapper: MetadataWrapper) -> None:
        super().__init__()
        self.code = wrapper.module.code_for_node
        self.names: dict[str, list[_Name]] = {}
        self.modules: set[str] = set()
        self.others: list[tuple[int, str]] = []
        self.used: set[str] = set()
        """Names of new classes that the file uses for things of its own."""
        self.own: set[str] = set()
        self.has_unknown = False
        """Whether an old module is asked for a name that it never had."""
        self._mentions: list[tuple[cst.Name, cst.CSTNode]] = []
        self._strings: list[tuple[int, str]] = []

    def line(self, node: cst.CSTNode) -> int:
        """Where a node begins."""
        return int(self.get_metadata(PositionProvider, node).start.line)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        below = None if node.relative else below_package(dotted(node.module))
        if below is None:
            return False
        if isinstance(node.names, cst.ImportStar):
            if is_old_module(below):
                self.others.append((self.line(node), f"all names of {below} are imported"))
            return False
        for alias in node.names:
            name, local = dotted(alias.name), _local(alias)
            entry = load().by_path.get((below, name))
            if not below and name in _OLD_OF_OWN:
                before = load().by_path[_OLD_OF_OWN[name], name]
                self.names.setdefault(local, []).append(_Name(local, before, self.line(alias), own=True))
            elif entry is not None and (is_old_module(below) or not is_real_name(below, name)):
                self.names.setdefault(local, []).append(_Name(local, entry, self.line(alias)))
            elif is_old_module(f"{below}.{name}".strip(".")) and not is_real_name(below, name):
                self.others.append((self.line(alias), f"the old module {name} is imported"))
            else:
                self.has_unknown |= is_old_module(below)
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        for alias in node.names:
            below = below_package(dotted(alias.name))
            if below and is_old_module(below):
                self.modules.add(dotted(alias.name))
                self.others.append((self.line(node), f"the old module {below} is imported"))
        return False

    def visit_Name(self, node: cst.Name) -> None:
        self._mentions.append((node, self.get_metadata(ParentNodeProvider, node)))

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.raw_value
        below = below_package(value) if value.isprintable() and " " not in value else None
        while below:
            if is_old_module(below):
                self._strings.append((self.line(node), f"the text {value!r} names an old path"))
                return
            below = below.rpartition(".")[0]

    def leave_Module(self, original_node: cst.Module) -> None:
        self.own = {local for local, names in self.names.items() if all(name.own for name in names)}
        for node, parent in self._mentions:
            if node.value in NEW_CLASS.values() and not _is_label(node, parent):
                old_here = any(not name.own for name in self.names.get(node.value, ()))
                self.used |= set() if old_here or node.value in self.own else {node.value}
        for node, parent in self._mentions:
            for name in self.names.get(node.value, ()):
                self._mention(name, node, parent)
        for names in self.names.values():
            if len({id(name.entry) for name in names}) > 1:
                for name in names:
                    name.reasons.append((name.line, f"{name.local} is imported from several places"))
            elif len(names) > 1 and not all(name.decided for name in names):
                reasons = [reason for name in names for reason in name.reasons]
                for name in names[1:]:
                    name.reasons = name.reasons or reasons[:1]
        self.others += self._strings

    def _mention(self, name: _Name, node: cst.Name, parent: cst.CSTNode) -> None:
        if _is_label(node, parent):
            return
        name.mentions += 1
        if name.own and not (isinstance(parent, cst.Call) and parent.func is node and self._is_old_call(name, parent)):
            return
        if name.entry.kind not in NEW_CLASS:
            if name.mentions == 1:  # once is enough
                text = f"{name.entry.name} has no single replacement: use {name.entry.use}"
                name.reasons.append((name.line, text))
        elif isinstance(parent, cst.Call) and parent.func is node:
            try:
                new, dropped = rewritten(name.entry, [self._argument(arg) for arg in parent.args])
            except Undecided as reason:
                name.reasons.append((self.line(node), str(reason)))
                return
            name.calls[id(parent)] = new
            if dropped:
                name.dropped.append((self.line(node), f"{name.entry.name}: {', '.join(dropped)} left out, no effect"))
        elif not isinstance(parent, cst.Annotation):
            name.reasons.append((self.line(node), f"{name.entry.name} is used without being called"))

    def _is_old_call(self, name: _Name, call: cst.Call) -> bool:
        """Whether a call of a class of today has arguments that only the old one took."""
        limit = 2 if name.entry.kind == "attention" else 3
        known = inspect.signature(getattr(import_module(PACKAGE), NEW_CLASS[name.entry.kind])).parameters
        given = [self._argument(arg).name for arg in call.args]
        return given.count("") > limit or any(word not in known for word in given if word not in ("", "*", "**"))

    def _argument(self, arg: cst.Arg) -> Argument:
        return Argument(arg.star or (arg.keyword.value if arg.keyword else ""), self.code(arg.value).strip())


def _is_label(node: cst.Name, parent: Any) -> bool:
    """Whether a name is an attribute's, a keyword's or a parameter's, not a use of the old name."""
    if isinstance(parent, cst.Attribute):
        return parent.attr is node
    return isinstance(parent, (cst.Arg, cst.Param)) and (
        (parent.keyword if isinstance(parent, cst.Arg) else parent.name) is node
    )


def _local(alias: cst.ImportAlias) -> str:
    return alias.asname.name.value if alias.asname and isinstance(alias.asname.name, cst.Name) else dotted(alias.name)


class _Rewriter(cst.CSTTransformer):
    """Second pass: nodes are those of the first, so calls are found by identity."""

    def __init__(self, found: _Collector) -> None:
        super().__init__()
        self.decided = {
            local: names[0]
            for local, names in found.names.items()
            if all(name.decided and not name.own for name in names)
        }
        # A new name that the file uses for something else is imported under the old one.
        taken = found.used | {local for local in found.names if local not in self.decided}
        self.renamed = {
            local
            for local, name in self.decided.items()
            if local == name.entry.name and (NEW_CLASS[name.entry.kind] not in taken - found.own)
        }
        self.calls = {call: new for names in found.names.values() for name in names for call, new in name.calls.items()}
        self.modules = found.modules
        self.own = {local for local, names in found.names.items() if any(name.own for name in names)}

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        local = original_node.func.value if isinstance(original_node.func, cst.Name) else ""
        if id(original_node) not in self.calls or not (local in self.decided or local in self.own):
            return updated_node
        old = updated_node.args
        new = self.calls[id(original_node)]
        args = [_new_argument(argument, old) for argument in new]
        ending = old[-1] if old else None
        if args and ending is not None:
            args = [_separated(arg, old) for arg in args[:-1]] + [args[-1].with_changes(comma=ending.comma)]
            if isinstance(ending.comma, cst.Comma) is False:
                args[-1] = args[-1].with_changes(whitespace_after_arg=ending.whitespace_after_arg)
        func = updated_node.func
        if local in self.renamed:
            func = cst.Name(NEW_CLASS[self.decided[local].entry.kind])
        return updated_node.with_changes(func=func, args=args)

    def leave_Annotation(self, original_node: cst.Annotation, updated_node: cst.Annotation) -> cst.Annotation:
        node = original_node.annotation
        if isinstance(node, cst.Name) and node.value in self.renamed:
            return updated_node.with_changes(annotation=cst.Name(NEW_CLASS[self.decided[node.value].entry.kind]))
        return updated_node

    def leave_ImportFrom(self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom) -> Any:
        below = None if original_node.relative else below_package(dotted(original_node.module))
        if below is None:
            return updated_node
        if isinstance(updated_node.names, cst.ImportStar):
            return updated_node.with_changes(module=_kept(below)) if is_old_module(below) else updated_node
        new: list[cst.ImportAlias] = []
        kept: list[cst.ImportAlias] = []
        same: list[cst.ImportAlias] = []
        for alias in updated_node.names:
            name, local = dotted(alias.name), _local(alias)
            is_old = is_old_module(below) or ((below, name) in load().by_path and not is_real_name(below, name))
            is_module = is_old_module(f"{below}.{name}".strip(".")) and not is_real_name(below, name)
            if is_old and local in self.decided:
                new.append(self._alias(alias, local))
            else:
                (kept if is_old or is_module else same).append(alias)
        if not new and not kept:
            return updated_node
        if original_node.module is not None and dotted(original_node.module) == PACKAGE:
            new, same = _once([*new, *same]), []
        targets = [(dotted_node(PACKAGE), _once(new)), (_kept(below), kept), (original_node.module, same)]
        lines = [(module, aliases) for module, aliases in targets if aliases]
        if len(lines) == 1:
            module, aliases = lines[0]
            return updated_node.with_changes(module=module, names=_ended(aliases, updated_node))
        return cst.FlattenSentinel(
            cst.ImportFrom(module=module, names=[_bare(alias, last=alias is aliases[-1]) for alias in aliases])
            for module, aliases in lines
        )

    def _alias(self, alias: cst.ImportAlias, local: str) -> cst.ImportAlias:
        target = NEW_CLASS[self.decided[local].entry.kind]
        if alias.asname is None and local not in self.renamed and local != target:
            space = cst.SimpleWhitespace(" ")
            asname = cst.AsName(cst.Name(local), whitespace_before_as=space, whitespace_after_as=space)
            return alias.with_changes(name=cst.Name(target), asname=asname)
        return alias.with_changes(name=cst.Name(target))

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> Any:
        """An import that became several: a line each."""
        if len(original_node.body) != 1 or len(updated_node.body) == 1:
            return updated_node
        first, *rest = (
            cst.SimpleStatementLine([part.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])
            for part in updated_node.body
        )
        lines = [first.with_changes(leading_lines=updated_node.leading_lines), *rest]
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(lines)

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        names = [
            alias.with_changes(name=_kept(below_package(dotted(alias.name)) or ""))
            if dotted(alias.name) in self.modules
            else alias
            for alias in updated_node.names
        ]
        return updated_node.with_changes(names=names)

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> Any:
        text = dotted(original_node)
        if text in self.modules:
            return _kept(below_package(text) or "").with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)
        return updated_node


def _kept(below: str) -> cst.Name | cst.Attribute:
    return dotted_node(f"{KEPT}.{below}" if below else KEPT)


def _once(aliases: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Without repeats: several old classes become one."""
    seen: dict[str, cst.ImportAlias] = {}
    for alias in aliases:
        seen.setdefault(_local(alias), alias)
    return list(seen.values())


def _bare(alias: cst.ImportAlias, *, last: bool) -> cst.ImportAlias:
    comma = cst.MaybeSentinel.DEFAULT if last else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    return alias.with_changes(comma=comma)


def _ended(aliases: list[cst.ImportAlias], node: cst.ImportFrom) -> list[cst.ImportAlias]:
    """The aliases with the last comma of the statement as it was."""
    last = node.names[-1] if isinstance(node.names, Sequence) else aliases[-1]
    return [*aliases[:-1], aliases[-1].with_changes(comma=last.comma)]


def _new_argument(argument: NewArgument, old: Sequence[cst.Arg]) -> cst.Arg:
    tight = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    if argument.source is None:
        return cst.Arg(cst.Name(argument.text), keyword=cst.Name(argument.name), equal=tight)
    arg = old[argument.source]
    if not argument.name:
        return arg
    equal = arg.equal if arg.keyword is not None else tight
    return arg.with_changes(keyword=cst.Name(argument.name), equal=equal)


def _separated(arg: cst.Arg, old: Sequence[cst.Arg]) -> cst.Arg:
    """The argument with a comma after it, like the first one of the call."""
    if isinstance(arg.comma, cst.Comma) and arg is not old[-1] and arg.comma is not old[-1].comma:
        return arg
    style = old[0].comma if len(old) > 1 else None
    comma = style if isinstance(style, cst.Comma) else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    return arg.with_changes(comma=comma, whitespace_after_arg=cst.SimpleWhitespace(""))
