"""Imports point down the list of docs/design.md, section 2, and nowhere else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"nbd_plugin", "zramd.cli"},
    {"zramd.kernel"},
    {"zramd.service"},
    {"zramd.control"},
    {"zramd.nbd"},
    {"zramd.attributes"},
    {"zramd.device"},
    {"zramd.opener"},
    {"zramd.gate"},
    {"zramd.store"},
    {"zramd.statistics", "zramd.sizes", "zramd.heap", "zramd.files", "zramd.without_ssl"},
    {"zramd.errors"},
    {"zramd"},
]
"""From the top down; what stands in one line does not import each other."""

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("zramd/**/*.py")])


def layer_of(module: str) -> int:
    """The place in the list of a module, or of what holds it."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for place, layer in enumerate(LAYERS):
            if ".".join(parts[:end]) in layer:
                if parts[:end] == ["zramd"] and len(parts) > 1:
                    break
                return place
    raise AssertionError(f"{module} stands in no layer: give it its place in LAYERS")


def package_of(module: str) -> str:
    """What may import itself freely: a package below zramd, or a module."""
    return ".".join(module.split(".")[:2])


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """The modules of ours that `source` imports, wherever in it, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if is_module(inner) else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.split(".")[0] in ("zramd", "nbd_plugin")}


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of `source`, the text of `module`, that do not point down."""
    return [
        f"{module} imports {target}"
        for target in sorted(imports(source, module, is_package=is_package))
        if package_of(target) != package_of(module) and layer_of(target) <= layer_of(module)
    ]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_point_down(file):
    assert not faults(file.read_text(), module_of(file), is_package=file.name == "__init__.py")


def test_every_module_stands_in_a_layer():
    assert len(FILES) > 10
    for file in FILES:
        layer_of(module_of(file))


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import zramd.device", "zramd.gate"),
        ("from zramd import device", "zramd.store.pages"),
        ("from .. import device", "zramd.store.pages"),
        ("from ..gate import Gate", "zramd.store.pages"),
        ("def f():\n    from zramd.nbd.server import Server", "zramd.device"),
        ("if TYPE_CHECKING:\n    import zramd.cli", "zramd.kernel.attach"),
        ("import importlib\nimportlib.import_module('zramd.control.client')", "zramd.nbd.server"),
        ("import zramd.sizes", "zramd.statistics"),
        ("import nbd_plugin", "zramd.cli.serve"),
    ],
)
def test_an_import_that_points_up_is_found(source, module):
    assert faults(source, module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from zramd.store import PAGE", "zramd.device"),
        ("from zramd.store.arena import Arena", "zramd.store.pages"),
        ("from . import arena", "zramd.store.pages"),
        ("import os, zramd.errors", "zramd.sizes"),
        ("from zramd import __version__", "zramd.cli.version"),
    ],
)
def test_an_import_that_points_down_is_not(source, module):
    assert not faults(source, module)


def test_a_module_that_stands_nowhere_is_found():
    with pytest.raises(AssertionError, match="stands in no layer"):
        layer_of("zramd.new")
