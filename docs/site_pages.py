"""What mkdocs adds to the pages of this folder, so that the site is made of the same files as the repository.

- README.md is the front page; the other documents outside of `docs/` are pages too (`DOCUMENTS`).
- Each package has a page of the API reference, made from its docstrings by mkdocstrings.
- Links that are right in the repository are right on the site: sources and notebooks that a page links to are shown as
  pages, other files are copied. A link to a file that does not exist is a warning, which `mkdocs --strict` refuses.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/README.md": "benchmarks.md",
    "launch/README.md": "launch.md",
}
MODULES = ("sampling", "typing", "experiment", "clock", "costs", "errors", "pixels", "pictures", "randomness")
"""What users import of the package besides its subpackages."""
WITHIN = ("training.optimizers", "training.ema", "training.logging", "config.overrides", "commands.image_files")
"""Modules that configs and users name within a subpackage."""
SHOWN = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".sbatch": "bash", ".toml": "toml"}
"""Files that become pages of code; others are copied as they are."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(```.*?^```$|(?: {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def packages() -> list[str]:
    """Subpackages that say what is public, then single modules."""
    found = sorted(path.parent.name for path in (ROOT / "diffusion_jax").glob("*/__init__.py"))
    public = [name for name in found if "__all__" in (ROOT / "diffusion_jax" / name / "__init__.py").read_text()]
    return [*public, *WITHIN, *MODULES]


def place_of(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path.startswith("docs/") and not path.startswith("docs/reports/"):
        return path.removeprefix("docs/")
    suffix = posixpath.splitext(path)[1]
    return f"source/{path}.md" if suffix in SHOWN or suffix == ".ipynb" else f"source/{path}"


def origin_of(place: str) -> str:
    """The file of the repository that a page was made of."""
    for path, page in DOCUMENTS.items():
        if page == place:
            return path
    if place.startswith("source/"):
        return place.removeprefix("source/").removesuffix(".md")
    return f"docs/{place}"


def outside_code(text: str, change) -> str:
    return "".join(part if number % 2 else change(part) for number, part in enumerate(CODE.split(text)))


def targets(path: str, text: str) -> list[str]:
    """The files of the repository that a page links to."""
    found: list[str] = []
    outside_code(text, lambda part: found.extend(match[2] for match in LINK.finditer(part)) or part)
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), one)) for one in found if "://" not in one]


def notebook(text: str) -> str:
    """The prose and the code of a notebook."""
    shown = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        shown.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(shown) + "\n"


def text_of(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    suffix = posixpath.splitext(path)[1]
    if suffix == ".ipynb":
        return notebook(text)
    return f"# {path}\n\n````{SHOWN[suffix]}\n{text}````\n" if suffix in SHOWN else text


def reference(name: str) -> str:
    """A page of the reference: what `__all__` names, functions first; a module without it shows what it defines."""
    path = ROOT / "diffusion_jax" / name.replace(".", "/")
    if not path.is_dir():
        return f"# diffusion_jax.{name}\n\n::: diffusion_jax.{name}\n"
    tree = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
    # By where a name is defined: a function may be called like the module that it is in.
    defined: dict[str, str] = {}
    public: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            public = sorted(ast.literal_eval(node.value), key=lambda one: (one[0].isupper(), one.lower()))
    parts = [f"# diffusion_jax.{name}", f"::: diffusion_jax.{name}\n    options:\n      members: false"]
    heading = "    options:\n      show_root_heading: true\n      show_root_toc_entry: true"
    parts += [f"::: {defined.get(one, f'diffusion_jax.{name}.{one}')}\n{heading}" for one in public]
    return "\n\n".join(parts) + "\n"


def title_of(page: Path) -> str:
    """The heading of a page up to its colon."""
    return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(":")[0]


def on_config(config):
    systems = sorted((ROOT / "docs" / "systems").glob("*.md"))
    titles = [{title_of(path): f"systems/{path.name}"} for path in systems]
    config.nav += [
        {"Published systems": ["systems.md", *titles]},
        {"API reference": [{name: f"api/{name}.md"} for name in packages()]},
        {"Project": [page for page in DOCUMENTS.values() if page != "index.md"]},
    ]
    return config


def on_files(files, config):
    for path, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=text_of(path)))
    for name in packages():
        files.append(File.generated(config, f"api/{name}.md", content=reference(name)))
    pages = [origin_of(file.src_uri) for file in files.documentation_pages() if not file.src_uri.startswith("api/")]
    while pages:
        path = pages.pop()
        for target in targets(path, text_of(path)):
            place = place_of(target)
            if not place.startswith("source/") or files.get_file_from_path(place) or not (ROOT / target).is_file():
                continue
            if place.endswith(".md"):
                files.append(File.generated(config, place, content=text_of(target)))
                if target.endswith(".ipynb"):
                    pages.append(target)
            else:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository as links of the site."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    path = origin_of(here)

    def moved(match):
        before, target, anchor, after = match.groups()
        if "://" in target:
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        place = posixpath.relpath(place_of(found), posixpath.dirname(here) or ".")
        return f"{before}{place}{anchor or ''}{after}"

    return outside_code(markdown, lambda part: LINK.sub(moved, part))
