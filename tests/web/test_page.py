"""The page in headless Chromium: the texts of Python, and what the page says."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.runtime.sampling.random_stream import uniform
from pastkey.web import site
from tools.web_assets import install

from ..programs import conftest as exported
from ..programs.environments import install_chromium
from ..runtime import conftest as decoder
from ..runtime.sampling.vectors import sampling_vectors
from .browser import ISOLATED, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
tiny, letters, make_bundle, talking = decoder.tiny, decoder.letters, decoder.make_bundle, decoder.talking
trained, bundles = exported.trained, exported.bundles
pytestmark = pytest.mark.slow
Page = Any

PROMPT, NEW_TOKENS = "Zoë had", 24
# A WebGPU for processors, which Chromium brings.
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
ROOT = Path(pastkey.__file__).parent.parent
PASTKEY_JS, DOCS = ROOT / "web" / "page" / "pastkey.js", ROOT / "docs" / "web.md"


@pytest.fixture(scope="module")
def packages():
    folder = install()
    if folder is None:
        pytest.skip("npm is not installed")
    return folder / "node_modules"


@pytest.fixture(scope="module")
def launch(packages):
    """launch(*FLAGS): Chromium, started once for each set of flags."""
    chromium = install_chromium()
    if chromium is None:
        pytest.skip("chromium is not installed; PASTKEY_INSTALL=1 installs Debian's")
    with playwright.sync_playwright() as driver:
        started: dict[tuple[str, ...], Any] = {}

        def browser(*flags: str) -> Any:
            if flags not in started:
                started[flags] = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", *flags])
            return started[flags]

        yield browser
        for each in started.values():
            each.close()


@pytest.fixture
def page(launch):
    """A new page of a browser without WebGPU, and without what earlier pages kept."""
    with launch().new_context() as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


def load(page: Page, address: str, provider: str = "wasm") -> dict[str, str]:
    """Opens the page and loads the model: what the page says of it."""
    page.goto(address)
    page.locator(f"[value={provider}]").check()
    page.locator("#load:enabled").click()
    page.locator("#form").wait_for()
    return facts(page)


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))


def write(page: Page, text: str, **options: object) -> str:
    """Types a text and returns what the model adds. `options` are fields of the form."""
    for name, value in options.items():
        page.evaluate("([name, value]) => (form.elements[name].value = value)", [name, str(value)])
    page.locator("#prompt").fill(text)
    page.locator("#send").click()
    page.locator("#log[aria-busy=false]").wait_for()
    assert page.locator("#error").text_content() == ""
    return str(page.locator("#log .text span, #log .assistant p").last.text_content())


def violations(page: Page, packages: Path) -> list[Any]:
    """What axe-core finds: the rule, and the element."""
    page.evaluate((packages / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    rules = "axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"
    found: list[Any] = page.evaluate(rules)
    return found


def shown(language: str) -> str:
    """The program of docs/web.md in this language."""
    (program,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(program)


def wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing answers at port {port}")


@pytest.mark.matrix
def test_int8_is_within_the_limit_and_writes_the_text_of_python_until_a_near_tie(page, bundles):
    bundle = bundles("llama")
    lm = pastkey.load(bundle, "cpu")
    expected = lm.generate(PROMPT, max_new_tokens=NEW_TOKENS).ids
    with serving(site(bundle), ISOLATED) as (address, _):
        load(page, address)
        golden, found = page.evaluate(
            """async ([prompt, maxNewTokens]) => {
                const { Model } = await import("./pastkey.js");
                const model = await Model.load("./");
                const text = model.generate(prompt, { maxNewTokens });
                for (;;) {
                    const { done, value } = await text.next();
                    if (done) return [await model.check({ seconds: 60 }), value.ids];
                }
            }""",
            [PROMPT, NEW_TOKENS],
        )
    assert golden["ok"]
    assert golden["rows"] == golden["of"]
    same = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    if same is not None:
        logits = lm.logits([*lm.prompt_ids(PROMPT), *expected[:same]])[-1]
        assert logits[expected[same]] - logits[found[same]] <= golden["limit"] * np.abs(logits).max()


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["llama-fp32", "llama-standard-fp32"])
def test_webgpu_writes_the_text_of_python(launch, bundles, name):
    """Token by token where a prefill is wrong, or may be."""
    bundle = bundles(name)
    expected = pastkey.load(bundle, "cpu").generate(PROMPT, max_new_tokens=NEW_TOKENS).text
    with launch(*SWIFTSHADER).new_context() as context, serving(site(bundle), ISOLATED) as (address, _):
        context.set_default_timeout(60_000)
        page = context.new_page()
        assert load(page, address, "webgpu")["Runs on"].startswith("GPU (WebGPU)")
        assert write(page, PROMPT, maxNewTokens=NEW_TOKENS) == expected


def test_without_webgpu_the_page_says_why(page, talking):
    with serving(site(talking)) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").wait_for()
        assert page.locator("[value=webgpu]").is_disabled()
        assert page.locator("#no-gpu").text_content() in (
            ": this browser has no WebGPU",
            ": WebGPU finds no graphics adapter",
        )
        said = page.evaluate(
            """async () => (await (await import("./pastkey.js")).Model.load("./", { provider: "webgpu" })).fallback"""
        )
    assert said in ("this browser has no WebGPU", "WebGPU finds no graphics adapter")


def test_a_conversation_is_that_of_python_on_one_thread_which_it_says(page, talking):
    chat = pastkey.load(talking, "cpu").chat()
    expected = [chat.ask(question, max_new_tokens=8).text for question in ("abc", "de")]
    with serving(site(talking)) as (address, _):
        said = load(page, address)
        assert [write(page, question, maxNewTokens=8) for question in ("abc", "de")] == expected
    alone = "one thread, since the page is not cross-origin isolated: see docs/web.md"
    assert said["Runs on"] == f"CPU (WebAssembly), {alone}"
    assert said["Golden logits"].startswith("agree: off by ")
    assert page.locator("dd.warning").count() == 0
    assert page.locator("#log h2").all_text_contents() == ["You", "Model"] * 2


def test_it_is_used_by_the_keyboard_alone(page, talking):
    expected = pastkey.load(talking, "cpu").chat().ask("bcd ef", max_new_tokens=8).text
    keys, prompt = page.keyboard, page.locator("#prompt")

    def focused() -> str:
        return str(
            page.evaluate("[document.activeElement].map(({ id, name, localName }) => id || name || localName)[0]")
        )

    def tabs(times: int, key: str = "Tab") -> list[str]:
        """What has the focus after each Tab."""
        return [[keys.press(key), focused()][1] for _ in range(times)]

    with serving(site(talking), ISOLATED) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").wait_for()
        assert tabs(2) == ["provider", "load"]
        keys.press("Enter")
        page.locator("#form").wait_for()
        keys.type("abd e")
        for key in ("Home", "Delete", "ArrowRight", "c", "End", "f", "Shift+Enter", "x", "Backspace", "Backspace"):
            keys.press(key)
        assert prompt.input_value() == "bcd ef"
        assert tabs(3) == ["send", "clear", "summary"]
        keys.press("Space")
        options = ["temperature", "topK", "topP", "minP", "repetitionPenalty", "seed", "maxNewTokens"]
        assert tabs(7) == options
        keys.type("8")  # over the selected number
        assert tabs(10, "Shift+Tab") == [*options[-2::-1], "summary", "clear", "send", "prompt"]
        keys.press("Enter")
        page.locator("#status", has_text="As many tokens as asked for: 8 tokens").wait_for()
        assert page.locator("#log p").all_text_contents() == ["bcd ef", expected]
        assert (prompt.input_value(), focused()) == ("", "prompt")


def test_stop_ends_a_text_and_continue_goes_on(page, talking):
    lm = pastkey.load(talking, "cpu")
    with serving(site(talking)) as (address, _):
        load(page, address)
        page.evaluate("form.elements.maxNewTokens.value = 500")
        page.locator("#prompt").fill("abc")
        page.keyboard.press("Enter")
        answer = page.locator("#log .assistant p")
        page.locator("#log .assistant p", has_text=re.compile("....")).wait_for()
        page.keyboard.press("Escape")
        page.locator("#status", has_text="Stopped: ").wait_for()
        stopped = answer.text_content()
        page.evaluate("form.elements.maxNewTokens.value = 5")
        page.locator("#continue:enabled").click()
        page.locator("#status", has_text="As many tokens as asked for: 5 tokens").wait_for()
        text = answer.text_content()
    assert 3 < len(stopped) < 500
    assert len(text) == len(stopped) + 5
    assert text == lm.chat().ask("abc", max_new_tokens=len(text)).text


def test_a_seed_draws_the_text_of_python(page, bundles):
    bundle = bundles("llama-fp32")
    drawn: Any = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    expected = pastkey.load(bundle, "cpu").generate(PROMPT, max_new_tokens=NEW_TOKENS, seed=7, **drawn).text
    with serving(site(bundle)) as (address, _):
        load(page, address)
        fields = {"temperature": 1.5, "topK": 50, "topP": 0.95, "minP": 0.01, "seed": 7, "maxNewTokens": NEW_TOKENS}
        assert write(page, PROMPT, **fields) == expected
        assert write(page, PROMPT, **fields | {"stopTexts": expected[4:8]}) == expected[:4]


def test_the_server_of_the_docs_isolates_and_the_page_takes_the_threads_of_the_machine(
    page, talking, tmp_path, command
):
    assert command("web", talking, "--out", tmp_path / "page")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = shown("python").replace("8000", str(port))
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            said = load(page, f"http://127.0.0.1:{port}/")
            assert len(write(page, "abc", maxNewTokens=4)) == 4
        finally:
            server.kill()
    cores = page.evaluate("navigator.hardwareConcurrency")
    expected = f"{min(cores, 8)} threads" if cores > 1 else "one thread"
    assert said["Runs on"] == f"CPU (WebAssembly), {expected}"


def test_the_program_of_the_docs_writes_the_text_of_python(page, talking):
    expected = pastkey.load(talking, "cpu").generate("abc", temperature=0.8, seed=7, max_new_tokens=64)
    program = shown("js").replace("Once upon a time", "abc")  # this model has letters alone
    files = {f"page/{name}": content for name, content in site(talking).items()}
    body = f'<body><script type="module">{program};document.title = "written"</script>'
    with serving(files | {"index.html": body.encode()}) as (address, _):
        page.goto(address)
        page.wait_for_function("document.title == 'written'")
        text = page.evaluate("[...document.body.childNodes].filter((node) => node.nodeType == 3).map((n) => n.data)")
    assert "".join(text) == expected.text


def test_a_damaged_file_is_refused(page, talking):
    files, name = dict(site(talking)), "golden.f32"
    whole = files[name]
    assert isinstance(whole, bytes)
    with serving(files | {name: whole[:-1] + bytes([whole[-1] ^ 1])}) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").click()
        page.locator("#error", has_text=f"{name} is damaged: its sha256 is ").wait_for()
        assert page.locator("#form").is_hidden()


def test_it_opens_and_writes_without_its_server(page, talking):
    with serving(site(talking)) as (address, end):
        load(page, address)
        expected = write(page, "abc", maxNewTokens=8)
        page.evaluate("navigator.serviceWorker.ready")
        end()
        assert load(page, address)["Size"].endswith(" are in this browser")
        assert write(page, "abc", maxNewTokens=8) == expected


@pytest.mark.matrix
def test_axe_finds_nothing(page, packages, talking):
    page.set_viewport_size({"width": 360, "height": 740})

    def found() -> list[Any]:
        schemes: list[Any] = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            schemes += violations(page, packages)
        return schemes

    with serving(site(talking)) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").wait_for()
        assert found() == []
        load(page, address)
        write(page, "abc", maxNewTokens=8)
        page.locator("summary", has_text="Sampling").click()
        assert found() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_a_tokenizer_it_takes_and_writes_ids(page, tiny, make_bundle):
    bundle = make_bundle(tiny, "standard", data_file="model.onnx_data", golden=True)
    with serving(site(bundle)) as (address, _):
        load(page, address)
        found = write(page, "1, 2 3", maxNewTokens=8)
        assert [int(word) for word in found.split()] == tiny.greedy([1, 2, 3], 8)
        page.locator("#prompt").fill("1 99999")
        page.locator("#send").click()
        page.locator("#error", has_text="the prompt has the token id 99999: ids are whole numbers from 0 to").wait_for()


# --- sampling -----------------------------------------------------------------------------------------------------
def test_the_sampler_draws_the_tokens_of_the_vectors():
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    vectors = [vector for vector in sampling_vectors() if vector.generates]
    cases = [
        {"logits": [max(logit, -1e30) for logit in vector.logits.tolist()], "ids": vector.ids, "seed": str(vector.seed),
         "settings": vector.settings}
        for vector in vectors
    ]  # fmt: skip
    script = f"""
        import {{ Sampler, uniform }} from {json.dumps(str(PASTKEY_JS))};
        import {{ readFileSync }} from "node:fs";
        const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
        const cases = JSON.parse(readFileSync(0)).map(({{ logits, ids, seed, settings }}) => {{
            const options = Object.fromEntries(Object.entries(settings).map(([name, value]) => [camel(name), value]));
            return new Sampler({{ ...options, seed: BigInt(seed) }}).sample(Float32Array.from(logits), ids);
        }});
        console.log(JSON.stringify([cases, uniform(2n ** 63n - 1n, 1000)]));
    """
    command = ["node", "--input-type=module", "--eval", script]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[vector.expected for vector in vectors], uniform(2**63 - 1, 1000)]
