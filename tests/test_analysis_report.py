"""What `attnres inspect` writes: figures, their numbers, and the page, in a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_tokens, randomize, retrofit, tiny_model

from attnres import AttnResForCausalLM, DepthAttention
from attnres.analysis import AnalysisError, DepthStatistics, Layout, depth_maps, inspect_checkpoint
from attnres.conversion import convert
from attnres.examples.demo import CHECKPOINT

pd = pytest.importorskip("pandas")
pytest.importorskip("altair")
pytest.importorskip("vl_convert")

INJECTION = "<img src=x onerror='window.injected=1'></script><script>window.injected=2</script> def f(x):\n\treturn x"
PYTHON = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 20


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "converted"
    convert(CHECKPOINT, directory, block_size=4, verify="none")
    return directory


@pytest.fixture(scope="module")
def trained(converted: Path) -> Path:
    """The same with queries that are not zero."""
    from transformers import AutoTokenizer

    model = AttnResForCausalLM.from_pretrained(converted, dtype=torch.float32)
    randomize(model)
    directory = converted.with_name("trained & <b>bold<b>")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(converted).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def inspected(trained: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspected")
    text = directory / "text.py"
    text.write_text(PYTHON)
    output = directory / "out"
    inspect_checkpoint(trained, text=text, prompt=INJECTION, compare=converted, output=output, gradients=True)
    return output


# -- files -------------------------------------------------------------------------------------------------------------


def test_files(inspected: Path) -> None:
    names = {path.name for path in inspected.iterdir()}
    for figure in ("depth-map", "depth-map-relative", "entropy", "mixing-matrix", "tokens", "parameters", "magnitudes"):
        assert {f"{figure}.png", f"{figure}.svg", f"{figure}.csv"} <= names
    assert {"depth-map-converted.png", "deviating-tokens.csv", "deviating-reads.csv", "report.html"} <= names
    assert {*json.loads((inspected / "inspection.json").read_text())["files"]} == names - {"inspection.json"}
    frame = pd.read_csv(inspected / "depth-map-converted.csv")
    np.testing.assert_allclose(frame["weight"], frame["uniform"], atol=1e-6)
    magnitudes = pd.read_csv(inspected / "magnitudes.csv")
    assert len(magnitudes) == 2 * 8
    assert (magnitudes["gradient"] > 0).all()
    svg = (inspected / "depth-map.svg").read_text()
    assert "Where every layer reads from" in svg
    assert "block 4" in svg


def test_page_needs_nothing_from_elsewhere(inspected: Path) -> None:
    page = (inspected / "report.html").read_text()
    assert len(page.encode()) < 3_000_000
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert "<b>bold" not in page
    assert "onerror" not in page
    assert "before the MLP of layer" in page


def test_drop_source_is_written(trained: Path, tmp_path: Path) -> None:
    inspections = inspect_checkpoint(trained, prompt="def f(x):\n    return", output=tmp_path / "out", drop=True)
    study = inspections[0].dropped
    assert study is not None
    frame = pd.read_csv(tmp_path / "out" / "drop-source.csv")
    assert len(frame) == len(study.reads) + len(study.blocks)
    assert (tmp_path / "out" / "weight-and-effect.png").stat().st_size > 1000
    assert "the loss rises from" in (tmp_path / "out" / "report.html").read_text()


def test_64_layers_make_a_page_below_3_mb() -> None:
    from attnres.analysis import report
    from attnres.analysis.inspection import Inspection
    from attnres.analysis.layer_outputs import Magnitudes
    from attnres.analysis.maps import DepthMaps
    from attnres.analysis.tables import parameters

    layout = Layout(128, 1, "mean", 2)  # Full AttnRes, which has the most weights
    statistics = DepthStatistics(layout)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1, 80, layout.num_visible(r), generator=generator).softmax(-1) for r in range(129)]
    statistics.add(weights, random_tokens(1, 80))
    maps = DepthMaps.of(statistics)
    depth = DepthAttention(129, 8)
    magnitudes = Magnitudes(64, False)
    magnitudes.sums += 1
    magnitudes.num_tokens = 1
    tokens = tuple(str(token) for token in maps.token_ids)
    found = [Inspection("large", maps, tokens, parameters(layout, depth), magnitudes, None)]
    page = report.page(found, list(report.make_figures(found, None)), {})
    assert len(page.encode()) < 3_000_000


def test_what_cannot_be_inspected(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "empty.txt").touch()
    for arguments, message in (
        (dict(checkpoint=CHECKPOINT), "attnres convert"),
        (dict(checkpoint=tmp_path / "nothing"), "cannot be loaded"),
        (dict(checkpoint=converted, output=tmp_path / "mine"), "holds no inspection"),
        (dict(checkpoint=converted, output=tmp_path / "mine", overwrite=True), "holds no inspection"),
        (dict(checkpoint=converted, text=tmp_path / "none.txt"), "cannot be read"),
        (dict(checkpoint=converted, text=tmp_path / "empty.txt"), "text is empty"),
        (dict(checkpoint=converted, prompt="x", read=17), "none of the reads 0 to 16"),
        (dict(checkpoint=converted, max_tokens=0), "max_tokens=0"),
    ):
        with pytest.raises(AnalysisError, match=message):
            inspect_checkpoint(**{"output": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_an_inspection_is_replaced_only_if_asked(inspected: Path, converted: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(inspected, output)
    with pytest.raises(AnalysisError, match="--overwrite"):
        inspect_checkpoint(converted, prompt="x = 1", output=output)
    inspect_checkpoint(converted, prompt="x = 1", output=output, overwrite=True)
    assert not (output / "depth-map-converted.png").exists()
    assert "Every read gives the same weight" in (output / "report.html").read_text()


def test_command_takes_less_than_a_minute(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnres.cli import main

    text = tmp_path / "text.py"
    text.write_text((PYTHON * 100)[:100_000])
    command = ["attnres", "inspect", str(converted), "--text", str(text), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    started = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert time.process_time() - started < 60
    assert "report.html" in capsys.readouterr().out


def test_plot() -> None:
    maps = depth_maps(retrofit(tiny_model("qwen3"), random_queries=True, block_size=2), random_tokens())
    chart = maps.plot().to_dict()
    assert chart["title"]["text"] == "Where every layer reads from"
    assert len(chart["vconcat"][0]["hconcat"]) == 2


def test_notebook(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(CHECKPOINT.parent / "inspect.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit it"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    html = [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("before the MLP of layer" in data.get("text/html", "") for data in html)


# -- the page, in a browser --------------------------------------------------------------------------------------------

FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync
""".split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs a browser: Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver, env=environment))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any, inspected: Path) -> Callable[..., Any]:
    def page(width: int = 1280, scheme: str = "light", path: Path = inspected / "report.html") -> Any:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(path.as_uri())
        wait(lambda: browser.execute_script("return document.body.dataset.ready"))
        return browser

    return page


def wait(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def run(browser: Any, script: str, *arguments: Any) -> Any:
    return browser.execute_script(script, *arguments)


def heading(browser: Any) -> str:
    return run(browser, "return document.querySelector('#profile h3').textContent")


def scroll_through(browser: Any) -> None:
    charts = run(browser, "return document.querySelectorAll('.chart').length")
    for index in range(charts):
        run(browser, "document.querySelectorAll('.chart')[arguments[0]].scrollIntoView()", index)
        drawn = "return document.querySelectorAll('.chart')[arguments[0]].querySelector('svg') !== null"
        wait(lambda drawn=drawn, index=index: run(browser, drawn, index))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_is_drawn_without_errors(page: Callable[..., Any], width: int, scheme: str) -> None:
    browser = page(width, scheme)
    assert len(run(browser, "return [...document.querySelectorAll('.map svg')].map(svg => svg.outerHTML)")) == 2
    scroll_through(browser)
    assert browser.get_log("browser") == []
    assert run(browser, "return performance.getEntriesByType('resource').length") == 0
    assert run(browser, "return document.documentElement.scrollWidth - innerWidth") <= 0
    paper = run(browser, "return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 29)")
    assert run(browser, "return document.getElementById('problem').hidden")


def test_hover_shows_the_sources_of_a_read(page: Callable[..., Any], inspected: Path) -> None:
    from selenium.webdriver import ActionChains

    browser = page()
    assert heading(browser) == "Read 16, before the final norm"
    cells = browser.find_elements("css selector", ".map .mark-rect path")
    run(browser, "arguments[0].scrollIntoView({block: 'center'})", cells[8])
    ActionChains(browser).move_to_element(cells[8]).perform()
    wait(lambda: "before the mixer of layer" in heading(browser))
    read = int(heading(browser).split()[1].rstrip(","))
    frame = pd.read_csv(inspected / "depth-map.csv")
    expected = frame[frame["read"] == read]
    shown = run(
        browser,
        "return [...document.querySelector('#profile tbody').rows]"
        ".map(row => [row.cells[0].textContent, row.cells[2].textContent])",
    )
    assert [name for name, _ in shown] == [*expected["name"]]
    for (_, text), weight in zip(shown, expected["weight"]):
        assert float(text.rstrip(" %")) == pytest.approx(100 * weight, abs=0.51)


def test_keys_choose_a_read(page: Callable[..., Any]) -> None:
    from selenium.webdriver import Keys

    browser = page()
    chart = browser.find_element("css selector", ".map")
    for key, expected in (
        (Keys.HOME, "Read 0, before the mixer of layer 0"),
        (Keys.ARROW_DOWN, "Read 2, before the mixer of layer 1"),
        (Keys.ARROW_RIGHT, "Read 3, before the MLP of layer 1"),
        (Keys.ARROW_UP, "Read 1, before the MLP of layer 0"),
        (Keys.ARROW_LEFT, "Read 0, before the mixer of layer 0"),
        (Keys.ARROW_LEFT, "Read 0, before the mixer of layer 0"),
        (Keys.END, "Read 16, before the final norm"),
    ):
        chart.send_keys(key)
        assert heading(browser) == expected
    assert browser.switch_to.active_element == chart


def test_a_token_shows_its_own_weights(page: Callable[..., Any]) -> None:
    from selenium.webdriver import Keys

    browser = page()
    tokens = browser.find_elements("css selector", "#tokens button")
    assert len(tokens) > 20
    browser.find_element("css selector", ".map").send_keys(Keys.HOME, Keys.ARROW_DOWN)
    run(browser, "arguments[0].scrollIntoView({block: 'center'})", tokens[3])
    tokens[3].click()
    assert run(browser, "return document.getElementById('token-name').textContent").startswith("Token 3:")
    assert run(browser, "return document.getElementById('mean').getAttribute('aria-pressed')") == "false"
    assert "token" in run(browser, "return document.querySelector('#profile thead').textContent")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert run(browser, "return document.getElementById('token-name').textContent").startswith("Token 4:")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert run(browser, "return document.getElementById('mean').getAttribute('aria-pressed')") == "true"


def test_text_injects_no_markup(page: Callable[..., Any]) -> None:
    browser = page()
    scroll_through(browser)
    for token in browser.find_elements("css selector", "#tokens button")[:12]:
        run(browser, "arguments[0].click()", token)
    assert run(browser, "return window.injected === undefined")
    assert run(browser, "return document.querySelectorAll('img, b').length") == 0
    assert "<b>bold<b>" in run(browser, "return document.querySelector('h1').textContent")
    assert "onerror" in run(browser, "return document.getElementById('tokens').textContent").replace("·", "")
