"""Make mutants of a Python file: copies with one small change, which the tests of the file should see.

Some code is left out. A mutant of a text is no fault, so docstrings, strings, annotations and the arguments of
exceptions and of calls that print or log stay. So do imports, decorators and the `strict` of `zip`.
"""

import ast
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "comparison": "another comparison, such as <= for <",
    "arithmetic": "another operator, such as - for +, or no minus",
    "boolean": "or for and, True for False",
    "constant": "a number plus or minus 1",
    "index": "another index, slice or axis",
    "statement": "a removed statement",
    "call": "the object or the first argument in place of a call",
    "argument": "a keyword argument left out",
    "branches": "swapped branches",
    "condition": "a negated condition",
    "return": "None returned",
    "default": "another default",
}
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PRINTS = {"print", "report", "warn", "warning", "info", "debug", "error", "exception", "exit", "ArgumentTypeError"}
AXES = {"axis", "axes"}  # keywords whose numbers are indices


class Mutant(NamedTuple):
    """One change of a file.

    function: its qualified name, empty outside functions; statement: the first line of the changed statement;
    before, after: the changed expression or statement; number: counts equal changes of equal statements, from 1;
    start, stop: the bytes of the file that `text` replaces.
    """

    file: str
    function: str
    statement: str
    kind: str
    before: str
    after: str
    number: int
    line: int
    start: int
    stop: int
    text: str

    def name(self):
        """Return what identifies the mutant even if other code moves."""
        return (self.file, self.function, self.statement, self.kind, self.before, self.after, self.number)

    def rank(self, seed):
        """Return a number in 0 to 1 that depends only on the seed and the name."""
        digest = hashlib.sha256(repr((seed, *self.name())).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def source(self, original):
        """Return the file's bytes with the change."""
        return original[: self.start] + self.text.encode() + original[self.stop :]


def mutants_of(path, file):
    """Return all mutants of a Python file; `file` is its name in the mutants."""
    source = Path(path).read_bytes()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    counts, found = Counter(), []
    for function, statement, node, changes in _Walk().places(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        before = ast.unparse(node).split("\n")[0]
        for kind, after in changes:
            name = (function, statement, kind, before, after)
            counts[name] += 1
            text = f"({after})" if isinstance(node, ast.expr) and not isinstance(node, ast.Slice) else after
            found.append(Mutant(file, *name, counts[name], node.lineno, start, stop, text))
    return found


class _Walk:
    """A walk through a tree that finds the places to change."""

    def places(self, tree):
        """Yield (function, statement, node, changes) for each place. A change is (kind, new text)."""
        self.function, self.statement, self.found, self.names = "", "", [], _assigned(tree)
        self.modules = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {"xp"}
        self.block(tree.body)
        return self.found

    def add(self, node, changes):
        changes = list(dict.fromkeys((kind, new if isinstance(new, str) else _text(new)) for kind, new in changes))
        if changes:
            self.found.append((self.function, self.statement, node, changes))

    def block(self, statements):
        for statement in statements:
            outer, self.statement = self.statement, _head(statement)
            self.visit_statement(statement)
            self.statement = outer

    def visit_statement(self, node):
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Global() | ast.Nonlocal() | ast.Pass():
                return
            case ast.Expr(ast.Constant()):  # a docstring
                return
            case ast.Expr(ast.Yield()):  # without it the function is no generator, which any test sees
                self.children(node)
                return
            case ast.If(ast.Compare(ast.Name("__name__"))):
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.definition(node)
                return
            case ast.ClassDef(name):
                outer, self.function = self.function, f"{self.function}.{name}".lstrip(".")
                self.block(node.body)
                self.function = outer
                return
            case ast.Raise():  # the arguments of an exception are its message
                self.add(node, [("statement", "pass")])
                return
            case ast.AugAssign(target, operator, value) if not _is_text(value):
                other = OPERATORS.get(type(operator))
                changed = [("arithmetic", ast.AugAssign(target, other(), value))] if other else []
                self.add(node, [("statement", "pass"), *changed])
            case ast.Assign(targets) if all(self.is_bound(target) for target in targets):
                self.add(node, [("statement", "pass")])
            case ast.Expr(ast.Call() as call):
                self.add(node, [("statement", "pass")])
                self.call(call, is_statement=True)
                return
            case ast.Expr() | ast.Continue() | ast.Break() | ast.Delete() | ast.Assert() | ast.Return(None):
                self.add(node, [("statement", "pass")])
            case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
                self.add(node, [("return", "return None")])
            case ast.If(test, _, orelse):
                self.condition(test, "branches" if orelse else "condition")
            case ast.While(test) if not isinstance(test, ast.Constant):
                self.condition(test, "condition")
        self.children(node)

    def definition(self, node):
        outer, self.function = self.function, f"{self.function}.{node.name}".lstrip(".")
        names, self.names = self.names, _assigned(node)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                changes = self.other_constants(default) or ([("", "None")] if _is_text(default) else [])
                self.add(default, [("default", new) for _, new in changes])
        self.block(node.body)
        self.function, self.names = outer, names

    def is_bound(self, target):
        """Return whether the target still has a value if the assignment is left out."""
        return isinstance(target, ast.Attribute | ast.Subscript) or (
            isinstance(target, ast.Name) and self.names[target.id] > 1
        )

    def condition(self, test, kind):
        negated = test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else None
        self.add(test, [(kind, negated or ast.UnaryOp(ast.Not(), test))])

    def other_constants(self, node, kind="constant"):
        """Return the changes of a number or truth value, also if it has a minus."""
        match node:
            case ast.Constant(bool(value)):
                return [("boolean", str(not value))]
            case ast.Constant(int(value) | float(value)):
                return [(kind, repr(value + 1)), (kind, repr(value - 1))]
            case ast.UnaryOp(ast.USub(), ast.Constant(int(value) | float(value))):
                return [(kind, repr(1 - value)), (kind, repr(-value - 1))]
        return []

    def children(self, node, kind="constant"):
        """Visit the expressions and blocks inside a node."""
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "pattern", "type"):
                continue
            for child in value if isinstance(value, list) else [value]:
                match child:
                    case ast.stmt():
                        self.block([child])
                    case ast.expr():
                        self.expression(child, kind)
                    case ast.keyword("strict"):
                        continue
                    case ast.keyword(name, inner):
                        self.expression(inner, "index" if name in AXES else kind)
                    case ast.comprehension(_, iterable, conditions):
                        self.expression(iterable)
                        for test in conditions:
                            self.condition(test, "condition")
                            self.expression(test)
                    case ast.ExceptHandler() | ast.withitem() | ast.match_case():
                        self.children(child)

    def expression(self, node, kind="constant"):
        if constants := self.other_constants(node, kind):
            self.add(node, constants)
            return
        match node:
            case ast.JoinedStr():
                return
            case ast.Compare(left, operators, others):
                self.add(
                    node,
                    [
                        ("comparison", ast.Compare(left, [*operators[:i], other(), *operators[i + 1 :]], others))
                        for i, operator in enumerate(operators)
                        for other in COMPARISONS[type(operator)]
                    ],
                )
            case ast.BoolOp(operator, values):
                other = ast.Or() if isinstance(operator, ast.And) else ast.And()
                self.add(node, [("boolean", ast.BoolOp(other, values))])
            case ast.BinOp(left, operator, right):
                if _is_text(left) or _is_text(right):
                    return
                if other := OPERATORS.get(type(operator)):
                    self.add(node, [("arithmetic", ast.BinOp(left, other(), right))])
            case ast.UnaryOp(ast.USub(), operand):
                self.add(node, [("arithmetic", operand)])
            case ast.UnaryOp(ast.Not(), operand):
                self.add(node, [("condition", operand)])
            case ast.IfExp(test):
                self.condition(test, "branches")
            case ast.Slice(lower, upper, step):
                changes = [("index", ast.Slice(None, upper, step))] if lower is not None else []
                changes += [("index", ast.Slice(lower, None, step))] if upper is not None else []
                self.add(node, changes)
                kind = "index"
            case ast.Subscript(value, index):
                self.expression(value)
                self.expression(index, "index")
                return
            case ast.Call():
                self.call(node)
                return
        self.children(node, kind if isinstance(node, ast.Tuple | ast.Slice) else "constant")

    def call(self, node, is_statement=False):
        """Visit a call, which may have other arguments or, unless it is a statement, be left out."""
        function, arguments, keywords = node.func, node.args, node.keywords
        name = getattr(function, "attr", getattr(function, "id", None))
        is_method = isinstance(function, ast.Attribute) and not (
            isinstance(function.value, ast.Name) and function.value.id in self.modules
        )
        if name in PRINTS or (is_method and _is_text(function.value)):
            return
        changes = []
        if is_method and not is_statement:
            changes.append(("call", function.value))
        elif arguments and not is_statement and not isinstance(arguments[0], ast.Starred | ast.GeneratorExp):
            changes.append(("call", arguments[0]))
        for i, keyword in enumerate(keywords):
            if keyword.arg not in (None, "strict") and not _is_text(keyword.value):
                changes.append(("argument", ast.Call(function, arguments, [*keywords[:i], *keywords[i + 1 :]])))
        self.add(node, changes)
        if name in ("isinstance", "issubclass"):
            self.expression(arguments[0])  # an operator of types makes no sense
        else:
            self.children(node)


def _assigned(tree):
    """Count how often each name gets a value in a function or module; a parameter gets one from the caller."""
    names = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] += 1
        elif isinstance(node, ast.arg):
            names[node.arg] += 1
    return names


def _is_text(node):
    if isinstance(node, ast.IfExp):
        return _is_text(node.body)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _head(statement):
    """Return the first line of a statement, without the body of a compound one."""
    return next(line for line in ast.unparse(statement).split("\n") if not line.startswith("@"))


def _text(node):
    return ast.unparse(ast.fix_missing_locations(node))
