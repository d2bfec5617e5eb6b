"""The playground in a real browser, on a real server."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Serving
from test_browser import WIDTHS

from ptkit.bank import AdapterBank
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN

ROOT = Path(__file__).resolve().parents[1]
THREE = ["facts-prefix", "facts-prompt", "routing-prefix"]
FACTS = "kind[boat], name[Ashmere], seats[eight], colour[green]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("playground")
    shutil.copytree(ROOT / "adapters", folder / "adapters")
    with Serving(folder / "adapters", folder / "log") as running:
        yield running


def opened(browser: Any, server: Serving, width: str, scheme: str) -> tuple[Any, list[str]]:
    wide, high = WIDTHS[width]
    page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((server.url, "data:")) else faults.append(request.url)
        ),
    )
    page.goto(server.url)
    page.wait_for_selector(".pick")
    return page, faults


@pytest.mark.parametrize(("width", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_three_adapters_and_the_base_answer_side_by_side(
    browser: Any,
    server: Serving,
    width: str,
    scheme: str,
) -> None:
    page, faults = opened(browser, server, width, scheme)
    # Keyboard only: reach each box, tick it, write, ask.
    for name in THREE:
        page.focus(f".pick[value={name}]")
        page.keyboard.press("Space")
    page.focus("#prompt")
    page.keyboard.type(FACTS)
    page.evaluate(
        """() => { window.grew = {};
        new MutationObserver((changes) => { for (const c of changes) {
          const article = c.target.closest?.("article");
          if (article) (window.grew[article.dataset.model] ??= []).push(performance.now());
        } }).observe(document.getElementById("answers"), { childList: true, subtree: true }) }"""
    )
    page.keyboard.press("Control+Enter")
    page.locator("article").nth(3).wait_for()
    page.wait_for_selector("article.running", state="detached")
    shown = {
        article.get_attribute("data-model"): article.query_selector(".text").inner_text()
        for article in page.query_selector_all("article")
    }
    bank = AdapterBank(load_base(TINY_EN, device="cpu"))
    bank.register_all(ROOT / "adapters")
    for name in (TINY_EN, "facts-prefix", "facts-prompt"):
        row = None if name == TINY_EN else name
        (expected,) = bank.generate([f"{FACTS}\n"], [row], max_new_tokens=64, do_sample=False)
        assert shown[name].strip() == expected.strip()
    (routed,) = bank.generate(
        [f"{FACTS}\nThis message is about"], ["routing-prefix"], max_new_tokens=64, do_sample=False
    )
    assert shown["routing-prefix"].split() == routed.split(), "each in its adapter's template"
    grew = page.evaluate("window.grew")
    assert all(len(grew[name]) > 5 for name in shown), "the answers came piece by piece"
    starts, ends = ([f(times) for times in grew.values()] for f in (min, max))
    assert max(starts) < min(ends), "side by side, not one after the other"
    assert "15.4 k parameters" in page.inner_text("#adapters")
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    assert faults == []
    page.close()


def test_a_conversation_goes_on_with_each_models_own_answers(browser: Any, server: Serving) -> None:
    page, faults = opened(browser, server, "desktop", "dark")
    asked: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda request: (
            asked.append(request.post_data_json) if "chat/completions" in request.url else None
        ),
    )
    page.check("input[value=chat]")
    assert page.is_hidden("#template-field")
    page.fill("#system", "Be brief.")
    page.focus(".pick[value=facts-prefix]")
    page.keyboard.press("Space")
    for text in ("kind[inn]", "name[Orwick]"):
        page.fill("#tokens", "8")
        page.fill("#prompt", text)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("article.running")
        page.wait_for_selector("article.running", state="detached")
    assert len(asked) == 4
    for request in asked[2:]:
        roles = [message["role"] for message in request["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
    first, second = ({r["model"]: r["messages"] for r in pair} for pair in (asked[:2], asked[2:]))
    for model, messages in second.items():
        assert messages[:2] == first[model]
        shown = page.locator(f"article[data-model='{model}'] .turn").all_inner_texts()
        assert shown == [m["content"] for m in messages if m["role"] != "system"]
    page.click("#anew")
    assert page.locator("article").count() == 0
    assert faults == []
    page.close()


def test_a_request_is_copied_as_others_send_it(browser: Any, server: Serving) -> None:
    page, _ = opened(browser, server, "desktop", "light")
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => {"
        " window.copied = t }}})"
    )
    page.uncheck("#with-base")
    page.focus(".pick[value=facts-prefix]")
    page.keyboard.press("Space")
    page.fill("#tokens", "6")
    page.fill("#prompt", 'kind[inn], name[Mary\'s "Inn"]')
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("article.running")
    page.wait_for_selector("article.running", state="detached")
    shown = page.inner_text("article .text")
    page.click("text=Copy as curl")
    command = page.evaluate("window.copied")
    done = subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == shown
    page.click("text=Copy as Python")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(page.evaluate("window.copied"), {})
    assert out.getvalue() == f"{shown}\n"
    page.close()


def test_adapters_are_swapped_unloaded_and_uploaded(browser: Any, server: Serving) -> None:
    page, _ = opened(browser, server, "desktop", "light")
    page.click("[aria-label='Swap routing-prefix']")
    page.fill("#swap-path", "../outside")
    page.click("#swap button.main")
    page.wait_for_selector("#swap .error:not(:empty)")
    assert "below the adapters' folder" in page.inner_text("#swap .error")
    page.fill("#swap-path", "facts-prefix")
    page.click("#swap button.main")
    page.wait_for_selector("#status:has-text('is swapped')")
    asked = f"{FACTS}\n"
    assert server.completion("routing-prefix", asked) == server.completion("facts-prefix", asked)
    page.click("[aria-label='Unload facts-prompt']")
    page.wait_for_selector(".pick[value=facts-prompt]", state="detached")
    page.click("#upload summary")
    page.fill("#upload-name", "mine")
    source = ROOT / "adapters" / "facts-prompt"
    names = ("adapter_config.json", "adapter_model.safetensors", "ptkit.json")
    page.set_input_files("#upload-files", [source / name for name in names])
    page.click("#upload button")
    page.wait_for_selector(".pick[value=mine]")
    page.fill("#search", "routing")
    page.wait_for_selector(".pick[value=mine]", state="detached")
    assert page.locator(".pick").count() == 2
    page.close()


def test_a_key_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-right-key\n")
    with Serving(ROOT / "adapters", tmp_path / "log", "--api-key-file", str(keys)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("dialog#key[open]")
        page.fill("#key-value", "the-right-key")
        page.keyboard.press("Enter")
        page.wait_for_selector(".pick")
        page.close()
