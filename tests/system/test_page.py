"""The page of `minigpt serve` in a real browser, against a real server and real stages."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import HOUR, ROOT, Stages, eventually

from attest.measure import measure
from attest.providers.mock import MockKey, MockRoot
from minigpt.client.pipeline import Pipeline
from minigpt.engine.config import Config

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra test)")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

TINY = ROOT / "minigpt" / "data"
WAIT = 60_000  # ms; the longest that anything may take on a machine that does other things
SEED = 11
LONG = 4000  # tokens: more than anybody waits for

BARS = "bars => bars.map(bar => bar.style.getPropertyValue('--p'))"
CONTRAST = (ROOT / "tests" / "data" / "contrast.js").read_text()


@contextmanager
def serving(stages: Stages, *flags: str) -> Iterator[str]:
    """The address of a server of this pipeline."""
    command = [sys.executable, "-m", "minigpt", "serve", "--port", "0", "--allow-mock"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--manifest", str(stages.path), "--model", str(stages.folder), *flags], cwd=ROOT, stderr=log
        )

        def said() -> str:
            log.seek(0)
            return log.read().decode()

        try:
            assert eventually(lambda: "http://" in said() or process.poll() is not None), said()
            found = re.search(r"http://127\.0\.0\.1:\d+", said())
            assert found, said()
            yield found[0]
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Tab:
    """The page in a tab of its own, and what the browser noticed."""

    def __init__(self, browser: Any, address: str, width: int = 1400, scheme: str = "light", **more: Any) -> None:
        height = 720 if width > 1000 else 740  # of what a browser shows on a small laptop
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.address = address
        self.requested: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#state.good")

    def generate(self, prompt: str, **options: float) -> str:
        """Sends a prompt with the keyboard; returns the continuation, once it has ended."""
        for name, value in options.items():
            self.page.fill(f"#{name}", str(value))
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")
        self.ended()
        return self.text

    def ended(self) -> None:
        self.page.wait_for_selector("body:not(.busy) #foot")

    @property
    def text(self) -> str:
        return str(self.page.text_content("#continuation"))


@contextmanager
def tab(browser: Any, address: str, **more: Any) -> Iterator[Tab]:
    """A tab in which nothing may go wrong: no message of the console, no request to another host."""
    opened = Tab(browser, address, **more)
    try:
        yield opened
        assert opened.errors == []
        own = (f"{address}/", f"blob:{address}/")
        assert [url for url in opened.requested if not url.startswith(own)] == []
    finally:
        opened.context.close()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """The embedded model in two stages, which no test ends."""
    with Stages(TINY, "6+6", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


@pytest.fixture(scope="module")
def address(stages: Stages) -> Iterator[str]:
    with serving(stages) as address:
        yield address


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on for thousands of tokens, of every kind."""
    config = Config.from_json(SMALL.to_json() | {"n_positions": LONG + 100, "vocab_size": 2048, "eos_token_id": None})
    folder = write(tmp_path_factory.mktemp("model") / "talker", config, random_tensors(config))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def expected(stages: Stages, prompt: str, max_tokens: int, temperature: float, seed: int = SEED) -> str:
    with Pipeline.connect(stages.path, model=stages.folder, allow_mock=True) as pipeline:
        tokens = pipeline.generate(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return "".join(token.text or "" for token in tokens)


def test_what_is_typed_is_continued_as_pipeline_generate_continues_it(
    browser: Any, stages: Stages, address: str
) -> None:
    with tab(browser, address) as opened:
        page = opened.page
        page.press("#prompt", "Control+a")
        page.keyboard.type("Spain has a border with")
        page.keyboard.press("Shift+Enter")
        page.keyboard.press("Backspace")
        for name, value in {"max_tokens": 40, "temperature": 1.5, "seed": SEED}.items():
            page.fill(f"#{name}", str(value))
        page.press("#prompt", "Enter")
        page.wait_for_selector("#continuation span")
        opened.ended()
        assert opened.text == expected(stages, "Spain has a border with", 40, 1.5)
        assert page.text_content("#given") == "Spain has a border with"
        assert [room.text_content() for room in page.query_selector_all(".stage .verdict b")] == ["PASS", "PASS"]
        assert all("bytes a token" in line.text_content() for line in page.query_selector_all(".line"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_and_can_be_read(browser: Any, address: str, width: int, scheme: str) -> None:
    with tab(browser, address, width=width, scheme=scheme, reduced_motion="reduce") as opened:
        page = opened.page
        for state in ("idle", "done", "token", "proof"):
            if state == "done":
                opened.generate("The capital of France is", max_tokens=100, temperature=2, seed=SEED)
            elif state == "token":
                page.hover("#continuation span:nth-child(3)")
                page.wait_for_selector("#card:not([hidden])")
            elif state == "proof":
                page.click("#promise")
            sizes = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
            across, down = page.evaluate(sizes)
            assert across == width
            assert width < 1000 or down == 720, "it scrolls on a laptop"
            assert page.evaluate(CONTRAST) == []


@pytest.mark.slow
def test_pulses_move_unless_motion_is_not_wanted(browser: Any, address: str) -> None:
    for wish, moves in (("no-preference", True), ("reduce", False)):
        with tab(browser, address, reduced_motion=wish) as opened:
            opened.page.evaluate(
                "new MutationObserver(() => document.querySelector('.packet') && (window.moved = true))"
                ".observe(document.body, {childList: true, subtree: true})"
            )
            opened.generate("Spain", max_tokens=10, seed=SEED)
            if moves:
                opened.page.wait_for_function("() => window.moved")
            else:
                assert not opened.page.evaluate("window.moved")


@pytest.mark.slow
def test_the_keyboard_is_enough(browser: Any, stages: Stages, address: str) -> None:
    with tab(browser, address) as opened:
        page, press = opened.page, opened.page.keyboard.press
        focused = "document.activeElement.id || document.activeElement.textContent || document.activeElement.name"
        assert page.evaluate(focused) == "prompt"

        def reach(name: str) -> None:
            for _ in range(60):
                if page.evaluate(focused) == name:
                    return
                press("Tab")
            raise AssertionError(f"Tab never reaches {name}")

        for name, value in {"max_tokens": 20, "temperature": 1, "seed": SEED}.items():
            reach(name)
            press("Control+a")
            page.keyboard.type(str(value))
        reach("go")
        press("Enter")
        page.wait_for_selector("#more:not([hidden])")
        first = opened.text
        assert first == expected(stages, "The capital of France is", 20, 1)

        reach("continuation")
        page.wait_for_selector("#card:not([hidden])")
        press("ArrowRight")
        assert page.text_content("#card p").startswith("token 2 of 20")
        probabilities = [float(text) for text in page.eval_on_selector_all("#card i", BARS)]
        assert 5 <= len(probabilities) <= 6  # the five most likely, and the one drawn
        assert probabilities == sorted(probabilities, reverse=True)
        assert page.locator("#card .own").count() == 1
        press("End")
        assert page.text_content("#card p").startswith("token 20 of 20")
        press("Escape")
        page.wait_for_selector("#card", state="hidden")

        reach("more")
        press("Enter")
        page.wait_for_function("first => document.querySelector('#given').textContent.endsWith(first)", arg=first)
        opened.ended()
        assert opened.text == expected(stages, "The capital of France is" + first, 20, 1)

        reach("language")
        press("ArrowRight")
        assert "from openai import OpenAI" in page.text_content("#snippet")
        reach("promise")
        press("Enter")
        page.wait_for_selector("#proof[open]")
        assert page.text_content("#digest") == stages.manifest.digest.hex()
        with page.expect_download() as download:
            reach("stage-1.json")
            press("Enter")
        where = download.value.path()
        pins = ["--root", stages.root.public.hex(), "--measurement", measure(ROOT).hex(), "--stage", "1"]
        command = [sys.executable, "-m", "attest", "verify", str(where), *pins]
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
        press("Escape")
        page.wait_for_selector("#proof", state="hidden")


@pytest.mark.slow
def test_the_lines_to_copy_give_the_text_that_is_shown(browser: Any, address: str) -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    with tab(browser, address) as opened:
        page = opened.page
        shown = opened.generate('It\'s "France"\nand $(Spain)', max_tokens=30, temperature=1.5)  # and a seed of its own
        curl = page.text_content("#snippet")
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
        page.evaluate("document.querySelector('[value=python]').click()")
        python = page.text_content("#snippet")
        assert json.loads(done.stdout)["choices"][0]["text"] == shown
        done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == shown + "\n"


@pytest.mark.slow
def test_escape_cancels_in_every_stage(browser: Any, talker: Path, tmp_path: Path) -> None:
    with (
        Stages(talker, "2+2", tmp_path) as stages,
        serving(stages.start_all()) as address,
        tab(browser, address) as opened,
    ):
        page = opened.page
        for stop in ("Escape", "click"):
            page.fill("#max_tokens", str(LONG))
            page.press("#prompt", "Enter")
            page.wait_for_selector("#continuation span:nth-child(4)")
            page.keyboard.press("Escape") if stop == "Escape" else page.click("#go")
            opened.ended()
            outcome = page.text_content("#outcome")
            assert "stopped by you" in outcome
            assert 3 < int(outcome.split()[0]) < LONG
            with Pipeline.connect(stages.path, text=False, allow_mock=True) as pipeline:

                def steps(pipeline: Pipeline = pipeline) -> list[int]:
                    return [report.steps for report in pipeline.status()]

                assert eventually(lambda steps=steps: _stands_still(steps))
        assert len(opened.generate("The", max_tokens=5, temperature=0, seed=0)) > 0


def _stands_still(figures: Any) -> bool:
    before = figures()
    time.sleep(0.5)
    return bool(figures() == before)


@pytest.mark.slow
def test_a_stage_that_dies_is_shown_and_so_is_its_return(browser: Any, tmp_path: Path) -> None:
    with Stages(TINY, "6+6", tmp_path) as stages, serving(stages.start_all()) as address:
        opened = Tab(browser, address)
        page = opened.page
        for index in (1, 0):
            stages.kill(index)
            page.wait_for_selector(f".stage.gone >> text=Stage {index}")
            assert page.text_content("#state") == f"stage {index} does not answer"
            page.press("#prompt", "Enter")
            page.wait_for_selector("#problem:not([hidden])")
            opened.ended()
            assert f"stage {index}" in page.text_content("#problem")
            assert page.evaluate(CONTRAST) == []
            stages.start(index)
            page.wait_for_selector("#state.good")
            assert page.text_content("#news") == f"Stage {index} is back"
            prompt = "The capital of Japan is"
            assert opened.generate(prompt, max_tokens=20, temperature=1, seed=SEED) == expected(stages, prompt, 20, 1)
            assert page.is_hidden("#problem")
        # The browser itself notes an answer that is an error; the page adds nothing.
        assert all("status of 503" in error for error in opened.errors), opened.errors
        opened.context.close()


@pytest.mark.slow
def test_an_answer_that_breaks_off_keeps_its_text_and_says_why(browser: Any, talker: Path, tmp_path: Path) -> None:
    with (
        Stages(talker, "2+2", tmp_path) as stages,
        serving(stages.start_all()) as address,
        tab(browser, address) as opened,
    ):
        page = opened.page
        page.fill("#max_tokens", str(LONG))
        page.press("#prompt", "Enter")
        page.wait_for_selector("#continuation span:nth-child(4)")
        stages.kill(1)
        page.wait_for_selector("#problem:not([hidden])")
        assert "stage 1" in page.text_content("#problem")
        opened.ended()
        assert opened.text
        page.wait_for_selector(".stage.gone")


@pytest.mark.slow
def test_a_key_is_asked_for_by_the_browser(browser: Any, stages: Stages, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("a-key-of-some-length\n")
    path.chmod(0o600)
    login = {"username": "any", "password": "a-key-of-some-length"}
    with (
        serving(stages, "--api-key-file", str(path)) as address,
        tab(browser, address, http_credentials=login) as opened,
    ):
        assert opened.generate("Spain", max_tokens=5, temperature=0, seed=0) == expected(stages, "Spain", 5, 0, 0)


@pytest.mark.slow
def test_refused_evidence_is_shown_with_got_and_wanted(browser: Any, tmp_path: Path) -> None:
    with Stages(TINY, "6+6", tmp_path) as stages, serving(stages.start_all()) as address:
        opened = Tab(browser, address, scheme="dark")
        page = opened.page
        stages.kill(1)
        foreign = tmp_path / "foreign.key"
        foreign.write_text(MockKey.generate(MockRoot.generate(), 1, int(time.time() * 1000) + HOUR).to_json())
        stages.start(1, key=foreign)
        page.wait_for_selector(".stage.fail")
        shown = page.inner_text(".stage.fail")
        assert "FAIL" in shown
        assert "Got" in shown
        assert "Wanted" in shown
        assert stages.root.public.hex() in shown
        assert page.inner_text(".line.fail") == "closed: nothing is sent"
        assert page.evaluate(CONTRAST) == []
        page.press("#prompt", "Enter")
        page.wait_for_selector("#problem:not([hidden])")
        stages.kill(1, signal.SIGTERM)
        stages.start(1)
        page.wait_for_selector("#state.good")
        assert len(page.query_selector_all(".stage.pass")) == 2
        opened.context.close()
