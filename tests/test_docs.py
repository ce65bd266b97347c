"""The docs are true: cli.md is what the commands print, links lead somewhere, and examples run and print what they say."""

import contextlib
import importlib.util
import io
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest

from relexio.cli.main import relexio_command
from relexio.engine.resources import Resources
from relexio.methods import METHODS, Recipe, Window, formulas
from relexio.methods.trials import make_trials
from relexio.progress import silent
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.demo.data import TARGET, WINDOW_END, unpack
from relexio.words import parse_steps
from tests.support.make import BF16, Run, Tensors, move
from tests.support.steps import small_blocks, store_run

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in (ROOT / "README.md", *DOCS) if page.is_file()]
RUN = [ROOT / "docs" / "python.md", pytest.param(ROOT / "docs" / "store.md", marks=pytest.mark.clients)]
#: A block of Python, and the block of text right behind it, if there is one: what it prints.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^(```+).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


def named(page: Path) -> str:
    return page.name


@pytest.fixture(scope="module")
def cli_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cli_docs", ROOT / "tools" / "cli_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("columns", ["40", "200"])
def test_cli_page_is_current_on_any_terminal(
    cli_docs: ModuleType, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli_docs.main(["--check"]) == 0


def test_cli_check_tells_a_page_that_is_not_current(
    cli_docs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_docs, "PAGE", tmp_path / "cli.md")
    assert cli_docs.main(["--check"]) == 1
    assert "python tools/cli_docs.py" in capsys.readouterr().err
    assert cli_docs.main([]) == 0
    assert cli_docs.main(["--check"]) == 0
    with open(tmp_path / "cli.md", "a", encoding="utf-8") as file:
        file.write("edited\n")
    assert cli_docs.main(["--check"]) == 1


def test_every_command_has_a_section() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in relexio_command.list_commands(click.Context(relexio_command)):
        assert f"\n## relexio {name}\n\n```text\nUsage: relexio {name} " in text


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for inline, reference in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = (inline or reference).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {path} is not there"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), (
            f"{page.name}: #{anchor} in {target.name}"
        )


def split_requirement(text: str) -> tuple[str, str]:
    """The name, without its extras, and the bound."""
    match = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", text)
    assert match is not None, text
    return match[1], match[2]


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    for requirement in required:
        name, bound = split_requirement(requirement)
        assert f"| `{name}" in text or f", `{name}`" in text, f"{name} is not in docs/dependencies.md"
        assert re.fullmatch(r">=[\d.]+", bound), f"{requirement}: lower bounds only"
    for extra in extras:
        assert f"`{extra}`" in text


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {name: bound.removeprefix(">=") for name, bound in map(split_requirement, project["dependencies"])}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    oldest = dict(re.findall(r"^\| `([\w-]+)(?:\[\w+\])?` \|.*\| ([\d.]+) \|$", text, re.MULTILINE))
    assert oldest.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", oldest[name]), (
            f"{name}: {bound}, and the page says {oldest[name]}"
        )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which ``relexio demo`` could have run: checkpoints and store in relexio-demo."""
    place = tmp_path_factory.mktemp("docs")
    run = unpack(place / "relexio-demo")
    store = place / "relexio-demo" / "run.zarr"
    for base, steps in ((run.base, f"1:{WINDOW_END}"), (None, str(TARGET))):
        convert(prepare(Request(store, base, run.checkpoints, {}, parse_steps(steps)), Resources(), silent), silent)
    return place


def examples(page: Path) -> Iterator[tuple[int, str, str | None]]:
    text = page.read_text(encoding="utf-8")
    for match in EXAMPLE.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1], match[2]


@pytest.mark.parametrize("page", RUN, ids=named)
def test_examples_run_and_print_what_they_say(page: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, object] = {"__name__": "__main__"}
    found = list(examples(page))
    assert found
    for line, code, said in found:
        if "import xarray" in code and importlib.util.find_spec("xarray") is None:
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, str(page), "exec"), names)
        assert out.getvalue() == (said or ""), f"{page.name}, line {line + 1}"


@pytest.fixture
def table_of_methods() -> Iterator[None]:
    """What is entered into the table of methods is gone after the test."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_the_example_of_a_method_is_one(table_of_methods: None) -> None:
    """It stands where the page says, among the names of formulas.py; and commands and backtest have it from the table."""
    page = ROOT / "docs" / "method.md"
    ((line, code, _),) = examples(page)
    before = set(METHODS)
    exec(compile("\n" * line + code, str(page), "exec"), dict(vars(formulas)))
    (name,) = METHODS.keys() - before
    steps, deltas = np.array([1, 2, 4, 7]), np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [8.0, 2.0]])
    recipe = Recipe(name)
    recipe.check(steps, [12])
    ahead = recipe.weights(Window(deltas @ deltas.T, steps), [12])[:, 0] @ deltas
    np.testing.assert_allclose(ahead, deltas[-1] + 5 / 5 * (deltas[-1] - deltas[1]))
    assert recipe in [trial.recipe for trial in make_trials(len(steps))]


def test_json_of_the_store_page_is_what_a_store_holds(demo: Path) -> None:
    blocks = re.findall(r"^```json\n(.*?)^```\n", (ROOT / "docs" / "store.md").read_text(encoding="utf-8"), re.M | re.S)
    codecs, marker, tensors, source = map(json.loads, blocks)
    store = demo / "relexio-demo" / "run.zarr"

    def metadata(path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((store / path / "zarr.json").read_text())
        return found

    assert codecs == metadata("base/bf16/bits")["codecs"]
    root = metadata("")["attributes"]["relexio"]
    made_up = {"metadata": 0, "consolidated": 0, "seal": 0, "segments": 0}
    assert {**marker, **made_up} == {**root, **made_up}
    shown, stored = marker["segments"], root["segments"][1:]
    assert [{**s, "metadata": 0} for s in shown] == [{**s, "metadata": 0} for s in stored]
    assert marker["metadata"].keys() <= root["metadata"].keys()
    assert shown[0]["metadata"].keys() <= stored[0]["metadata"].keys()
    assert tensors == metadata("base")["attributes"]["tensors"][:2]
    made = metadata("base")["attributes"]["source"]
    assert source.keys() == made.keys()
    assert source["shards"][0].keys() == made["shards"][0].keys()
    assert source["shards"][0]["header"] == made["shards"][0]["header"]
    assert source["side"].items() <= made["side"].items()
    (one,) = metadata("segments/0001")["attributes"]["sources"]
    assert one.keys() == made.keys() and one["step"] == TARGET


def test_the_reader_of_the_store_page_reads_any_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds, large and small and empty tensors, more of them than share a block, and steps in any order, merged."""
    small_blocks(monkeypatch, 1024, 256)
    rng = np.random.default_rng(0)
    base: Tensors = {f"small.{i}": rng.standard_normal((i % 3, 5)).astype(BF16) for i in range(100)}
    base["large"] = rng.standard_normal((50, 70)).astype(BF16)
    base["half"] = rng.standard_normal(2000).astype(np.float16)
    base["single"] = rng.standard_normal(9).astype(np.float32)
    base["ids"], base["mask"] = rng.integers(-9, 9, (5, 3)), np.array([True, False])
    steps = {step: {**some, "ids": base["ids"] + step // 3} for step, some in move(base, list(range(1, 13))).items()}
    run, out = Run(tmp_path, base, steps), tmp_path / "run.zarr"
    for added in ("3,7", "1:2", *map(str, (4, 5, 6, 8, 9, 10)), "12", "11"):
        store = store_run(run, out, added)
    assert [segment.steps for segment in store.segments] == [(3, 7, 1, 2, 4, 5, 6, 8, 9, 10), (12,), (11,)]
    names: dict[str, Any] = {}
    (reader,) = (code for _, code, _ in examples(ROOT / "docs" / "store.md") if "def read_tensor" in code)
    exec(reader, names)
    for step, tensors in ((None, base), *((step, steps[step]) for step in (7, 1, 10, 12, 11))):
        for name in ("large", "half", "single", "ids", "mask", *(f"small.{i}" for i in (0, 2, 70, 95, 98))):
            assert names["read_tensor"](str(out), name, step).tobytes() == tensors[name].tobytes(), (step, name)
    one, other = sorted((out / "segments" / store.segments[0].name / "bf16" / "by" / "c").iterdir())[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="is damaged"):
        for name in base:
            names["read_tensor"](str(out), name, 12)
