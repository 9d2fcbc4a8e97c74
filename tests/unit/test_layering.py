"""The shape of the packages: who may import whom, what a bare import costs, how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tgvkv_sglang"
KERNELS = ROOT / "triton_kernels"
FILES = sorted([*PLUGIN.rglob("*.py"), *KERNELS.rglob("*.py")])
HEAVY = {"torch", "transformers", "sglang", "triton", "flashinfer", "numpy"}
OPTIONAL = {"pytest", "hypothesis", "httpx", "matplotlib"}  # in extras alone
LEAVES = {"types", "errors", "config", "flags", "spans", "namespace", "registry", "device", "trace", "__init__"}
# What each part may import, itself aside. Parts not listed (the demo's data) are free-standing.
MAY_IMPORT = {
    "leaves": {"leaves"},
    "kv": {"leaves", "tgvkv_kernels"},
    "selection": {"leaves", "kv", "tgvkv_kernels"},
    "attention": {"leaves", "kv", "selection", "tgvkv_kernels"},
    "request": {"leaves", "kv", "selection"},
    "sglang_seam": {"leaves", "kv", "selection", "attention", "request", "tgvkv_kernels"},
    "cli": {"leaves", "sglang_seam", "demo"},
    "demo": {"leaves"},
    "testing": {"leaves", "cli", "demo"},  # for tests and benchmarks: nothing above may import it
    "tgvkv_kernels": set(),
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file (``from a import b`` gives a and a.b)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    base = PLUGIN.parent if path.is_relative_to(PLUGIN) else KERNELS
    package = path.relative_to(base).parent.parts
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(start + ([node.module] if node.module else []))
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def part(module: str) -> str | None:
    """Which part of the packages a module belongs to; None for others."""
    names = module.split(".")
    if names[0] == "tgvkv_kernels":
        return "tgvkv_kernels"
    if names[0] != "tgvkv_sglang":
        return None
    if len(names) == 1:
        return "leaves"
    if names[1] in MAY_IMPORT:
        return names[1]
    return "leaves" if names[1] in LEAVES or not (PLUGIN / names[1]).exists() else names[1]


def own_part(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "tgvkv_kernels"
    parts = path.relative_to(PLUGIN).parts
    return "leaves" if len(parts) == 1 else parts[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_finds_the_packages():
    parts = {own_part(path) for path in FILES}
    assert parts >= {"leaves", "kv", "selection", "request", "attention", "sglang_seam", "tgvkv_kernels"}
    assert "sglang.srt.mem_cache.base_prefix_cache" in imports(PLUGIN / "sglang_seam" / "radix_cache.py")
    assert "tgvkv_sglang.kv.radix" in imports(PLUGIN / "sglang_seam" / "radix_cache.py")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_seam_imports_sglang(path):
    if own_part(path) != "sglang_seam":
        assert not {module for module in imports(path) if module.split(".")[0] == "sglang"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    own = own_part(path)
    assert own in MAY_IMPORT, f"{own} is a new part: say in MAY_IMPORT what it may import"
    for module in imports(path):
        assert part(module) in {None, own} | MAY_IMPORT[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_optional_packages_are_not_needed_to_import_anything(path):
    assert not {module.split(".")[0] for module in imports(path, top_level_only=True)} & OPTIONAL


def module_of(path: Path) -> str:
    base = PLUGIN.parent if path.is_relative_to(PLUGIN) else KERNELS
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty if there are none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        found = next((found for other in sorted(graph[module]) if (found := walk(other, [*path, module]))), [])
        done.add(module)
        return found

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_circles_are_found():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c"]


def test_no_module_imports_itself_by_way_of_others():
    """Imports for type checking and inside functions count: what needs them in a circle is one thing cut in two."""
    modules = {module_of(path): path for path in FILES}
    graph = {module: imports(path) & modules.keys() - {module} for module, path in modules.items()}
    for module, others in graph.items():  # a package that names its own modules is not one of them
        graph[module] = {other for other in others if not module.startswith(f"{other}.")}
    assert sum(map(len, graph.values())) > 100
    assert circle(graph) == []


def test_leaf_modules_are_known():
    assert {path.stem for path in PLUGIN.glob("*.py")} == LEAVES


def test_importing_the_package_is_cheap():
    assert not {module.split(".")[0] for module in imports(PLUGIN / "__init__.py")} & HEAVY


@pytest.mark.parametrize("stem", ["types", "errors", "config", "flags"])
def test_leaves_that_every_process_reads_are_light(stem):
    assert not {module.split(".")[0] for module in imports(PLUGIN / f"{stem}.py")} & HEAVY


def test_the_kernels_folder_is_no_package():
    """SGLang's dependencies install a package of that very name, which ours must not shadow."""
    assert not (KERNELS / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
