"""The report: one page that asks the network for nothing, whatever tensors are called; and its figures as pictures."""

import json
import re
import struct
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.errors import RequestError
from relexio.report import curves, data, report
from relexio.report.data import Facts
from relexio.report.report import Request, default_page
from relexio.report.words import keys, verdict
from tests.support.command import Relexio
from tests.support.made_up import made_up, names
from tests.support.make import BF16, Run, base_tensors, make_run
from tests.support.pages import FIGURES, HOSTILE, STEPS, page_of
from tests.support.steps import store_run

vl_convert = pytest.importorskip("vl_convert", reason="needs the extra report")
pytest.importorskip("altair", reason="needs the extra report")

SHAPES = {"model.embed_tokens.weight": (40, 24), "model.layers.0.q_proj.weight": (33, 31), "lm_head.weight": (24,)}


@dataclass
class Page(HTMLParser):
    """What a browser would find in a page: elements with their attributes, and the text of scripts and styles."""

    tags: list[tuple[str, dict[str, str | None]]]
    texts: list[tuple[str, str]]

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def content(self) -> Any:
        """The data that the scripts draw."""
        text = re.search(r'<script type="application/json" id="report">(.*?)</script>', self.rawdata_, re.S)
        assert text is not None
        return json.loads(text[1])

    def feed(self, data: str) -> None:
        self.rawdata_ = data
        super().feed(data)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return made_up([*names(2), HOSTILE], STEPS)


@pytest.fixture(scope="module")
def text(facts: Facts) -> str:
    return page_of(facts)[0]


def test_page_asks_the_network_for_nothing(text: str) -> None:
    page = Page(text)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "href", "action", "background", "data"} & attributes.keys()
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy and "http" not in policy and "script-src 'unsafe" not in policy
    styles = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in styles and "@import" not in styles
    assert json.dumps(page.content).count("http") == json.dumps(page.content).count("https://vega.github.io/schema/")


def test_names_of_tensors_cannot_leave_their_places(text: str) -> None:
    page = Page(text)
    assert [a.get("type") for a in page.all("script")] == ["application/json", None, None]
    assert not page.all("img")
    assert HOSTILE not in text and "\u2028" not in re.sub(r"<td>[^\n]*", "", text)
    (data,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', text, re.S)
    assert "<" not in data and ">" not in data  # nothing that could end the element, or begin a comment in it
    drawn = json.dumps(page.content, ensure_ascii=False)
    assert json.dumps(HOSTILE, ensure_ascii=False)[1:-1] in drawn
    assert HOSTILE.replace("\u2028", "") in "".join(t for _, t in page.texts).replace("\u2028", "")


def test_page_has_figures_verdict_and_keys(facts: Facts, text: str) -> None:
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert [a["name"] for a in page.all("meta") if "name" in a][:1] == ["viewport"]
    assert [a["id"] for a in page.all("div") if a.get("class") == "chart"] == list(FIGURES)
    assert [figure["name"] for figure in page.content["figures"]] == list(FIGURES)
    assert all(figure["spec"]["description"] for figure in page.content["figures"])
    said = "".join(t for _, t in page.texts)
    for sentence in verdict(facts).sentences:
        assert sentence in said
    for key in keys(facts):
        assert key.value in said and key.why in said
    assert said.count("your own evaluation can choose") == 2
    assert verdict(facts).sure in {a["class"].split()[1] for a in page.all("section") if a.get("class")}  # type: ignore[union-attr]


def test_tables_of_coefficients_and_energy(facts: Facts) -> None:
    tables = curves.coefficients(facts.found, 48)
    drawn = {row["tensor"]: row for row in tables.points}
    tensor = max(facts.found.tensors, key=lambda t: t.sigma2)
    row, line = drawn[tensor.name], tensor.line
    np.testing.assert_allclose(row["value"], tensor.coefficients / tensor.coefficients[-1], rtol=1e-4)
    (end,) = [t for t in tables.targets if t["tensor"] == tensor.name]
    assert end["value"] == pytest.approx((line.slope * 48 + line.intercept) / tensor.coefficients[-1], rel=1e-4)
    assert {t.part for t in facts.found.tensors} <= {row["part"] for row in tables.points}
    assert sum(row["top"] for row in tables.points) == 12 + 1
    lasts = np.array([t.coefficients[-1] for t in facts.found.tensors])
    model = sum(t.coefficients * t.coefficients[-1] for t in facts.found.tensors) / (lasts @ lasts)
    np.testing.assert_allclose(drawn[data.WHOLE]["value"], model, rtol=1e-4)

    cells = {(row["layer"], row["part"]): row for row in data.energy(facts.found)}
    some = [t for t in facts.found.tensors if (t.layer, t.part) == (1, "norm")]
    assert cells["1", "norm"]["tensors"] == len(some) == 4
    weighted = sum(t.energy * t.sigma2 for t in some) / sum(t.sigma2 for t in some)
    assert cells["1", "norm"]["kept"] == pytest.approx(weighted, rel=1e-4)
    assert sum(row["share"] for row in cells.values()) == pytest.approx(1, rel=1e-3)
    assert data.layers(facts.found) == ["none", "0", "1"]


def test_skills_are_those_of_the_backtest_and_awful_ones_are_left_out(facts: Facts) -> None:
    judged, found = facts.found.judged, data.skills(facts.found)
    assert judged is not None and judged.verdict is not None and found is not None
    first = found.methods[0]
    assert first.startswith(str(judged.verdict.pick.recipe))
    values = [row["skill"] for row in found.rows if row["method"] == first]
    expected = judged.verdict.skills[~np.isnan(judged.verdict.skills)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert -1 <= found.floor < 0 and found.top > max(values)
    worst = judged.best_of_each_method()[-1]
    name = str(worst.recipe)
    below = np.nanmax(judged.test.by_horizon(worst.trial, worst.strength)) <= found.floor
    assert below == any(name in other for other in found.below)


def test_many_steps_are_thinned_and_ends_kept() -> None:
    assert data.thin(5).tolist() == [0, 1, 2, 3, 4]
    some = data.thin(5000)
    assert len(some) == 200 and some[0] == 0 and some[-1] == 4999


def test_target_goes_where_the_verdict_sees_skill(facts: Facts) -> None:
    judged = facts.found.judged
    assert judged is not None and judged.verdict is not None and judged.verdict.farthest > 25
    assert data.default_target(facts.found) == judged.verdict.farthest
    assert data.default_target(replace(facts.found, judged=None)) == 48


def test_pictures_are_pngs_of_the_page_s_figures(facts: Facts, tmp_path: Path) -> None:
    _, pictures = page_of(facts, tmp_path)
    assert [path.name for path in pictures] == [f"{name}.png" for name in FIGURES]
    for picture in pictures.values():
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", picture[16:24])
        assert 1500 <= width <= 1600 and 400 <= height <= 1600
        assert len(picture) > 10_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store_run(make_run(tmp_path, steps=tuple(range(1, 13)), shapes=SHAPES, size=3e-3), tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def test_command_writes_page_and_pictures(relexio: Relexio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    done = relexio("report", "run.zarr", "--png", "figures/of run", "--step", 30, "--json")
    assert done.code == 0, done.err
    written = json.loads(done.out)
    assert written["page"] == "run.html" and written["target"] == 30 and written["window"] == list(range(1, 13))
    assert written["bytes"] == Path("run.html").stat().st_size
    assert sorted(written["pictures"]) == sorted(str(p) for p in Path("figures/of run").iterdir())
    assert len(written["pictures"]) == len(FIGURES)
    page = Page(Path("run.html").read_text())
    said = "".join(t for _, t in page.texts)
    assert "relexio report run.zarr --window 1:12 --step 30 --png 'figures/of run' -o run.html" in said
    assert {"last observed: step 12", "target: step 30"} <= set(
        re.findall(r'"says": "([^"]*)"', json.dumps(page.content))
    )
    assert not list(run.parent.glob("*.relexio-partial"))


def test_nothing_is_overwritten(relexio: Relexio, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "pngs").mkdir()
    (tmp_path / "pngs" / "thrown.png").write_text("mine")
    for arguments, named in (
        (("-o", tmp_path / "there.html"), "there.html"),
        (("-o", tmp_path / "new.html", "--png", tmp_path / "pngs"), "thrown.png"),
    ):
        done = relexio("report", run, *arguments)
        assert done.code == 1 and f"{named}: exists" in done.err
    assert [p.read_text() for p in (tmp_path / "there.html", tmp_path / "pngs" / "thrown.png")] == ["mine", "mine"]
    assert not (tmp_path / "new.html").exists()


@pytest.mark.parametrize(("option", "value", "said"), [("--step", 12, "not beyond"), ("--rank", 13, "does not fit")])
def test_what_the_window_cannot_give_is_refused(
    relexio: Relexio, run: Path, tmp_path: Path, option: str, value: int, said: str
) -> None:
    done = relexio("report", run, option, value, "-o", tmp_path / "new.html")
    assert done.code == 1 and said in done.err and not (tmp_path / "new.html").exists()


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float32")], ids=["bf16", "fp32"])
def test_two_steps_and_one_tensor(relexio: Relexio, tmp_path: Path, dtype: np.dtype) -> None:
    still = tuple(name for name in SHAPES if "q_proj" not in name)
    made = make_run(tmp_path, dtype, steps=(1, 2), shapes=SHAPES, still=still, size=3e-3)
    store_run(made, tmp_path / "run.zarr")
    out = tmp_path / "two.html"
    done = relexio("report", tmp_path / "run.zarr", "-o", out, "--png", tmp_path / "png")
    assert done.code == 0, done.err
    page = Page(out.read_text())
    assert [figure["name"] for figure in page.content["figures"]] == list(FIGURES[1:-1])
    said = "".join(t for _, t in page.texts)
    assert "There is no verdict: a backtest takes at least three observed steps, and the window has 2." in said
    assert sorted(p.stem for p in (tmp_path / "png").iterdir()) == sorted(FIGURES[1:-1])


def test_a_run_in_which_nothing_moved_is_refused(relexio: Relexio, tmp_path: Path) -> None:
    base = {**base_tensors(BF16, shapes=SHAPES), "count": np.zeros(3, np.int64)}
    made = Run(tmp_path, base, {step: {**base, "count": np.full(3, step)} for step in (1, 2, 3)})
    store_run(made, tmp_path / "run.zarr")
    done = relexio("report", tmp_path / "run.zarr", "-o", tmp_path / "out.html")
    assert done.code == 1 and "no tensor moved" in done.err and not (tmp_path / "out.html").exists()


def test_without_the_extra_it_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relexio.progress import silent
    from relexio.store.store import open_store
    from tests.support.steps import CPU

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    store = open_store(str(run))
    with pytest.raises(RequestError, match=r"pip install 'relexio\[report\]'"):
        report(store, Request(tmp_path / "out.html", None, store.steps), CPU, silent)


def test_page_is_named_after_the_run() -> None:
    assert default_page("s3://bucket/runs/grpo.zarr/") == Path("grpo.html")
    assert default_page("/data/run") == Path("run.html")
