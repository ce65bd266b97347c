"""The report: one page that asks the network for nothing, whatever tensors are called; and its figures as pictures."""

import base64
import hashlib
import json
import re
import struct
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.errors import RequestError
from relexio.methods import METHODS
from relexio.methods.line_tests import random_walk
from relexio.methods.roles import PARTS
from relexio.methods.verdict import outlook
from relexio.report import ReportRequest, data, default_page, report
from relexio.report.data import Facts
from relexio.report.theme import COLOURS, PART_COLOURS, palettes
from relexio.report.words import key_figures, verdict
from tests.support.command import Relexio
from tests.support.made_up import made_up, names
from tests.support.make import BF16, Run, base_tensors, make_run
from tests.support.pages import FIGURES, HOSTILE, STEPS, page_of
from tests.support.steps import store_run

figures = pytest.importorskip("relexio.report.figures", reason="needs the extra report")
curves = pytest.importorskip("relexio.report.coefficients").curves
page = pytest.importorskip("relexio.report.page").page

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


def test_nothing_that_is_named_can_add_an_element(facts: Facts) -> None:
    evil = "</title></pre><script>1</script>'\"&"
    pages = []
    for name in ("plain", evil):
        command, store = f"relexio report {name} -o x.html", replace(facts.findings.store, address=name)
        named = replace(facts, findings=replace(facts.findings, store=store))
        pages.append(Page(page(named, figures.figures(named), name, command)))
    assert [tag for tag, _ in pages[1].tags] == [tag for tag, _ in pages[0].tags]
    said = "".join(t for _, t in pages[1].texts)
    assert said.count(evil) == 4  # title, heading, store, command


def test_policy_names_the_scripts_by_their_hashes(text: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2
    assert f"script-src {' '.join(f'&#39;sha256-{name}&#39;' for name in hashes)};" in policy.replace("'", "&#39;")


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
    for key in key_figures(facts):
        assert key.value in said and key.why in said
    assert said.count("your own evaluation can choose") == 2
    assert verdict(facts).sure in {classes.split()[1] for a in page.all("section") if (classes := a.get("class"))}


def test_tables_of_coefficients_and_energy(facts: Facts) -> None:
    tables = curves(facts.findings, 48)
    drawn = {row["tensor"]: row for row in tables.points}
    tensor = max(facts.findings.tensors, key=lambda t: t.sigma2)
    row, line = drawn[tensor.name], tensor.line
    np.testing.assert_allclose(row["value"], tensor.coefficients / tensor.coefficients[-1], rtol=1e-4)
    (end,) = [t for t in tables.targets if t["tensor"] == tensor.name]
    assert end["value"] == pytest.approx((line.slope * 48 + line.intercept) / tensor.coefficients[-1], rel=1e-4)
    assert {t.part for t in facts.findings.tensors} <= {row["part"] for row in tables.points}
    assert sum(row["top"] for row in tables.points) == 12 + 1
    lasts = np.array([t.coefficients[-1] for t in facts.findings.tensors])
    model = sum(t.coefficients * t.coefficients[-1] for t in facts.findings.tensors) / (lasts @ lasts)
    np.testing.assert_allclose(drawn[data.WHOLE]["value"], model, rtol=1e-4)

    cells = {(row["layer"], row["part"]): row for row in data.energy_cells(facts.findings)}
    some = [t for t in facts.findings.tensors if (t.layer, t.part) == (1, "norm")]
    assert cells["1", "norm"]["tensors"] == len(some) == 4
    weighted = sum(t.energy * t.sigma2 for t in some) / sum(t.sigma2 for t in some)
    assert cells["1", "norm"]["kept"] == pytest.approx(weighted, rel=1e-4)
    assert sum(row["share"] for row in cells.values()) == pytest.approx(1, rel=1e-3)
    assert data.layers(facts.findings) == ["none", "0", "1"]


def test_skills_are_those_of_the_backtest_and_awful_ones_are_left_out(facts: Facts) -> None:
    judged, found = facts.findings.judged, data.skill_lines(facts.findings)
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
    few = data.over_steps((1, 2, 5), "share", np.array([0.1, np.nan, 1 / 3]))
    assert few == {"step": [1, 2, 5], "share": [0.1, None, 0.33333]}
    steps = tuple(range(5000))
    many = data.over_steps(steps, "share", np.array(steps) / 2)
    assert len(many["step"]) == 200 and (many["step"][0], many["step"][-1]) == (0, 4999)
    assert many["share"] == [step / 2 for step in many["step"]]


@pytest.mark.parametrize(
    ("skill", "said"),
    [(0.154, "+.15"), (-0.04, "−.04"), (-3.0, "< −1"), (1.0, "+1.0"), (-0.99, "−.99"), (0.0, ".00"), (-0.001, ".00")],
)
def test_skill_of_a_part_has_four_characters(facts: Facts, skill: float, said: str) -> None:
    class Judgement:
        verdict = facts.findings.judged.verdict if facts.findings.judged else None

        def parts(self, pick: object) -> dict[str, np.ndarray]:
            return {"q": np.array([np.nan, skill])}

    judged: Any = Judgement()
    (row,) = data.skill_by_part(replace(facts.findings, judged=judged))
    assert row == {"part": "q", "horizon": "1.25×", "skill": skill, "said": said}


def test_skill_is_told_as_far_ahead_as_predict_vouches(facts: Facts) -> None:
    judged, last = facts.findings.judged, facts.findings.window[-1]
    assert judged is not None and judged.verdict is not None
    test, pick = judged.test, judged.verdict.pick
    place = test.order[pick.trial]
    totals, predicted = test.totals[:, [place]], test.predicted[:, [place]]
    alone = replace(test, trials=[pick.trial], strengths=(pick.strength,), totals=totals, predicted=predicted)
    for share in (0.9, 1.0, 1.04, 1.06, 2.0):
        target = round(last * judged.verdict.tested * share)
        vouched = outlook(alone, target, last).skill is not None
        assert (data.skill_at(facts.findings, target) is not None) == vouched == (share < 1.05)


def test_a_random_walk_is_measured_as_everywhere_else(facts: Facts) -> None:
    steps = np.array(facts.findings.window)
    energy, r_squared = random_walk(steps)
    assert facts.walk.energy == pytest.approx(energy) and facts.walk.line.r_squared == pytest.approx(r_squared)
    shares = [row["share"] for row in data.energy_by_direction(facts) if row["of"] == data.WALK]
    assert shares[0] == pytest.approx(energy, rel=1e-4) and len(shares) == 10


def test_every_part_and_every_method_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PART_COLOURS) == set(PARTS)
    usual = palettes([])["methods"]
    more = {f"new-{place}": replace(METHODS["secant"], name=f"new-{place}") for place in range(5)}
    count = sum(method.extrapolates for method in METHODS.values())
    for place, (name, method) in enumerate(more.items(), count + 1):
        monkeypatch.setitem(METHODS, name, method)
        if place > 12:
            with pytest.raises(RequestError, match=rf"colours for 12 methods, and {place} extrapolate: .*theme.py"):
                palettes([])
            continue
        for theme, colours in palettes([])["methods"].items():
            assert colours[:count] == usual[theme]
            assert len(colours) == place
            pairs = combinations([*colours, COLOURS[theme]["card"]], 2)
            assert min(distance(one, other) for one, other in pairs) > 25, "some look alike"


def distance(one: str, other: str) -> float:
    """How different two colours look: their distance in CIE L*a*b*, where 2 is just seen."""
    places = []
    for colour in (one, other):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])  # the bend near black is left out
        places.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return float(np.linalg.norm(places[0] - places[1]))


def test_docs_name_the_pictures() -> None:
    text = (Path(__file__).parent.parent / "docs/report.md").read_text()
    assert re.findall(r"`(\w+)\.png`", text) == list(FIGURES)


def test_target_goes_where_the_verdict_sees_skill(facts: Facts) -> None:
    judged = facts.findings.judged
    assert judged is not None and judged.verdict is not None and judged.verdict.farthest > 25
    assert data.default_target(facts.findings) == judged.verdict.farthest
    assert data.default_target(replace(facts.findings, judged=None)) == 48


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
    assert [f"figures/of run/{name}.png" for name in FIGURES[1:]] == written["pictures"]  # there was no sweep
    page = Page(Path("run.html").read_text())
    said = "".join(t for _, t in page.texts)
    assert "relexio report run.zarr --window 1:12 --step 30 --png 'figures/of run' -o run.html" in said
    assert {"last observed: step 12", "target: step 30"} <= set(
        re.findall(r'"says": "([^"]*)"', json.dumps(page.content))
    )
    assert not list(run.parent.glob("*.relexio-partial"))


def test_scores_of_a_sweep_are_shown(relexio: Relexio, run: Path, tmp_path: Path) -> None:
    command = """python3 -c "print(0.5 + $RELEXIO_STEP / 1000)" # {checkpoint}"""
    options = ("--steps", "20,30", "--methods", "relex,pinned", "--problems", 100, "--eval", command)
    assert relexio("sweep", run, "--window", "1:11", *options).code == 0
    assert relexio("report", run, "--window", "1:11", "-o", tmp_path / "with.html").code == 0
    page = Page((tmp_path / "with.html").read_text())
    (figure,) = [figure for figure in page.content["figures"] if figure["name"] == "scores"]
    rows = [row for rows in re.findall(r'\[\{"series".*?\}\]', json.dumps(figure["spec"])) for row in json.loads(rows)]
    found = {(row["series"], row["step"]): row["score"] for row in rows}
    assert found == {
        **{("observed", step): 0.5 + step / 1000 for step in (0, 11)},
        **{(f"{method}, strength 1", step): 0.5 + step / 1000 for method in ("relex", "pinned") for step in (20, 30)},
    }
    assert all(row["high"] - row["score"] == pytest.approx(0.05, rel=0.01) for row in rows)
    assert '"known": 0.511' in json.dumps(figure["spec"])  # step 11, the last observed
    (tmp_path / "run.sweep" / "results.json").rename(tmp_path / "kept.json")
    (tmp_path / "run.sweep" / "results.json").write_text('{"format": 1}')
    done = relexio("report", run, "--window", "1:11", "-o", tmp_path / "damaged.html")
    assert done.code == 0 and "note: without scores of a sweep: " in done.err
    (tmp_path / "kept.json").rename(tmp_path / "run.sweep" / "results.json")
    # those of another window or run are not
    assert relexio("report", run, "-o", tmp_path / "other.html").code == 0
    assert "Not measured. Only your own evaluation" in (tmp_path / "other.html").read_text()
    other = tmp_path / "other"
    store_run(make_run(other, steps=(1, 2, 3), shapes=SHAPES, size=3e-3, seed=5), other / "run.zarr")
    (tmp_path / "run.sweep").rename(other / "run.sweep")
    assert relexio("report", other / "run.zarr", "-o", tmp_path / "without.html").code == 0
    assert "Not measured. Only your own evaluation" in (tmp_path / "without.html").read_text()


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


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--step", 12, "not beyond"), ("--rank", 13, "does not fit"), ("--window", 3, "at least 2")],
)
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
    assert [figure["name"] for figure in page.content["figures"]] == list(FIGURES[2:-1])
    said = "".join(t for _, t in page.texts)
    assert "There is no verdict: a backtest needs at least 3 observed steps, and the window has 2." in said
    assert sorted(p.stem for p in (tmp_path / "png").iterdir()) == sorted(FIGURES[2:-1])


def test_a_run_in_which_nothing_moved_is_refused(relexio: Relexio, tmp_path: Path) -> None:
    base = {**base_tensors(BF16, shapes=SHAPES), "count": np.zeros(3, np.int64)}
    made = Run(tmp_path, base, {step: {**base, "count": np.full(3, step)} for step in (1, 2, 3)})
    store_run(made, tmp_path / "run.zarr")
    done = relexio("report", tmp_path / "run.zarr", "-o", tmp_path / "out.html")
    assert done.code == 1 and "no tensor moved" in done.err and not (tmp_path / "out.html").exists()


def test_without_the_extra_it_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relexio.progress import silent
    from relexio.store.opening import open_store
    from tests.support.steps import CPU

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    store = open_store(str(run))
    with pytest.raises(RequestError, match=r"pip install 'relexio\[report\]'"):
        report(store, ReportRequest(tmp_path / "out.html", None, store.steps), CPU, silent)


def test_page_is_named_after_the_run() -> None:
    assert default_page("s3://bucket/runs/grpo.zarr/") == Path("grpo.html")
    assert default_page("/data/run") == Path("run.html")
