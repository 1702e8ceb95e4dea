"""Write the checks of arguments and the enums for C++: `generate.py KERNELS INTO`.

`kernels/checks.py` and `kernels/enums.py` are the source of both languages. Of Python this reads what `checks.py` needs
and no more: functions of typed arguments, `if`, `for`, assignments, calls, arithmetic, comparisons and f-strings. The
words that they are made of are written twice, in `kernels/arguments.py` and in `csrc/arguments.h`.
"""

import ast
import sys
from pathlib import Path

TYPES = {
    "Tensor": "const Tensor&",
    "Tensor | None": "const std::optional<Tensor>&",
    "list[int]": "const List&",
    "int": "Int",
    "int | None": "std::optional<Int>",
    "float": "double",
    "bool": "bool",
    "str": "Text",
}
COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
DIVISIONS = {ast.FloorDiv: "quotient", ast.Mod: "remainder"}
HEADER = "// Written by csrc/generate.py from kernels/{source}.py.\n#pragma once\n\n{includes}\n{body}"


class TranslationError(Exception):
    """What stands in the source has no translation."""

    def __init__(self, node):
        super().__init__(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]} has no translation to C++")


class Function:
    """One check in C++.

    Args:
        tree: the function.
        enums: the members of each enum, by its name.
    """

    def __init__(self, tree, enums):
        self.tree, self.enums = tree, enums
        types = {argument.arg: ast.unparse(argument.annotation) for argument in tree.args.args}
        self.optional = {name for name, type in types.items() if type.endswith("| None")}
        # C++ warns of a parameter with a name that the body does not use.
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        arguments = (f"{TYPES[type]} {name if name in used else ''}".rstrip() for name, type in types.items())
        self.signature = f"inline void {tree.name}({', '.join(arguments)})"

    def text(self):
        return f"{self.signature} {{\n{self.block(self.tree.body, 1)}}}\n"

    def block(self, statements, depth):
        return "".join(self.statement(statement, depth) for statement in statements)

    def statement(self, node, depth):
        indent, inside = "  " * depth, depth + 1
        match node:
            case ast.Expr(ast.Constant(str())):
                return ""
            case ast.Expr(ast.Call()):
                return f"{indent}{self.value(node.value)};\n"
            case ast.Assign([ast.Name(name)], value):
                return f"{indent}const auto {name} = {self.value(value)};\n"
            case ast.If(test, body, rest):
                text = f"{indent}if ({self.value(test)}) {{\n{self.block(body, inside)}{indent}}}"
                return text + (f" else {{\n{self.block(rest, inside)}{indent}}}\n" if rest else "\n")
            case ast.For(ast.Name(name), ast.Call(ast.Name("range"), [ast.Constant(end)]), body):
                return (
                    f"{indent}for (int {name} = 0; {name} < {end}; ++{name}) {{\n{self.block(body, inside)}{indent}}}\n"
                )
            case ast.For(ast.Name(name), values, body):
                return (
                    f"{indent}for (const Int {name} : {self.value(values)}) {{\n{self.block(body, inside)}{indent}}}\n"
                )
        raise TranslationError(node)

    def value(self, node):
        match node:
            case ast.Constant(bool() as value):
                return str(value).lower()
            case ast.Constant(int() as value):
                return f"Int({value})"
            case ast.Constant(float() as value):
                return repr(value)
            case ast.Constant(str() as value):
                return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            case ast.Name(name):
                return f"(*{name})" if name in self.optional else name
            case ast.Attribute(ast.Name(enum), member) if enum in self.enums:
                return f"Int(static_cast<int64_t>({enum}::{member}))"
            case ast.Compare(ast.Name(name), [ast.Is() | ast.IsNot() as test], [ast.Constant(None)]):
                return ("" if isinstance(test, ast.IsNot) else "!") + f"{name}.has_value()"
            case ast.Compare(left, [test], [right]) if type(test) in COMPARISONS:
                return f"({self.value(left)} {COMPARISONS[type(test)]} {self.value(right)})"
            case ast.BoolOp(test, parts):
                return "(" + (" && " if isinstance(test, ast.And) else " || ").join(map(self.value, parts)) + ")"
            case ast.UnaryOp(ast.Not(), value):
                return f"!{self.value(value)}"
            case ast.UnaryOp(ast.USub(), value):
                return f"(-{self.value(value)})"
            case ast.BinOp(ast.Constant(2), ast.Pow(), ast.Constant(power)):
                return f"Int::power_of_two({power})"
            case ast.BinOp(left, operation, right) if type(operation) in ARITHMETIC:
                return f"({self.value(left)} {ARITHMETIC[type(operation)]} {self.value(right)})"
            case ast.BinOp(left, operation, right) if type(operation) in DIVISIONS:
                return f"{DIVISIONS[type(operation)]}({self.value(left)}, {self.value(right)})"
            case ast.Subscript(list, index):
                return f"{self.value(list)}[{self.value(index)}]"
            case ast.Call(ast.Name("len"), [ast.Name(enum)]) if enum in self.enums:
                return f"Int({len(self.enums[enum])})"
            case ast.Call(ast.Name("len"), [list]):
                return f"{self.value(list)}.length()"
            case ast.Call(ast.Name("refuse"), [sentence]):
                return f"fail({self.sentence(sentence)})"
            case ast.Call(ast.Name(name), arguments, []):
                return f"{name}({', '.join(map(self.value, arguments))})"
        raise TranslationError(node)

    def sentence(self, node):
        match node:
            case ast.JoinedStr(parts):
                return ", ".join(map(self.sentence, parts))
            case ast.FormattedValue(value, -1, None):
                return self.value(value)
            case ast.FormattedValue(value, -1, ast.JoinedStr([ast.Constant("g")])):
                return f"General{{{self.value(value)}}}"
        return self.value(node)


def enums_of(source):
    """Return the members of each enum by its name, as pairs of a name and a number."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: [(line.targets[0].id, line.value.value) for line in node.body if isinstance(line, ast.Assign)]
        for node in classes
    }


def enums_header(source):
    """Return the enums of `source` as a header of C++ that device code may include."""
    text = "".join(
        f"enum class {name} : int64_t {{ {', '.join(f'{member} = {value}' for member, value in members)} }};\n"
        for name, members in enums_of(source).items()
    )
    body = f"namespace pyfast_xai {{\n\n{text}\n}}  // namespace pyfast_xai\n"
    return HEADER.format(source="enums", includes="#include <cstdint>\n", body=body)


def checks_header(source, enums):
    """Return the functions of `source` as a header of C++.

    Raises:
        TranslationError: there is more of Python in `source` than has a translation.
    """
    functions = [Function(node, enums) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    declarations = "".join(f"{function.signature};\n" for function in functions)
    definitions = "\n".join(function.text() for function in functions)
    body = f"namespace pyfast_xai::checks {{\n\n{declarations}\n{definitions}\n}}  // namespace pyfast_xai::checks\n"
    return HEADER.format(source="checks", includes='#include "arguments.h"\n#include "enums.h"\n', body=body)


def main(kernels, into):
    enums, checks = ((Path(kernels) / name).read_text() for name in ("enums.py", "checks.py"))
    Path(into).mkdir(parents=True, exist_ok=True)
    (Path(into) / "enums.h").write_text(enums_header(enums))
    (Path(into) / "checks.h").write_text(checks_header(checks, enums_of(enums)))


if __name__ == "__main__":
    main(*sys.argv[1:])
