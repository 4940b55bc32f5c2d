"""The page in headless Chromium: the texts of Python, and what the page says."""

import contextlib
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pastkey
from pastkey.runtime.sampling.random_stream import uniform
from pastkey.web import site
from tools.web_assets import install

from ..programs import conftest as exported
from ..programs.environments import install_chromium
from ..runtime.decoding.batching import waiting
from ..runtime.sampling.vectors import sampling_vectors
from .browser import ISOLATED, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
trained, bundles = exported.trained, exported.bundles
pytestmark = pytest.mark.slow

PROMPT, NEW_TOKENS = "Zoë had", 24
# A WebGPU for processors, which Chromium includes.
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
        start = driver.chromium.launch
        yield functools.cache(lambda *flags: start(executable_path=chromium, args=["--no-sandbox", *flags]))


@pytest.fixture
def page(launch):
    """A new page of a browser without WebGPU, and without what earlier pages kept."""
    with launch().new_context() as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


@contextlib.contextmanager
def loaded(page, files, provider="wasm", **serve):
    """A site of these files, whose page has loaded the model. Yields what the page says of it."""
    with serving(files, **serve) as (address, _):
        yield load(page, address, provider)


def load(page, address, provider="wasm"):
    """Opens the page and loads the model: what the page says of it."""
    page.goto(address)
    page.locator(f"[value={provider}]").check()
    page.locator("#load:enabled").click()
    page.locator("#form").wait_for()
    return dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))


def write(page, text, **options):
    """Types a text and returns what the model adds. `options` are fields of the form."""
    for name, value in options.items():
        page.evaluate("([name, value]) => (form.elements[name].value = value)", [name, str(value)])
    page.locator("#prompt").fill(text)
    page.locator("#send").click()
    page.locator("#log[aria-busy=false]").wait_for()
    assert page.locator("#error").text_content() == ""
    return page.locator("#log .text span, #log .assistant p").last.text_content()


def of_docs(language):
    """The first program of docs/web.md in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]


@pytest.mark.matrix
def test_int8_is_within_the_limit_of_the_golden_logits(page, bundles):
    with loaded(page, site(bundles("llama")), headers=ISOLATED) as said:
        assert said["Golden logits"].startswith("agree: off by ")
        assert len(write(page, PROMPT, maxNewTokens=NEW_TOKENS)) > NEW_TOKENS // 2


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["llama-fp32", "llama-standard-fp32"])
def test_webgpu_writes_the_text_of_python(launch, bundles, name):
    """Token by token where a prefill is wrong, or may be."""
    bundle = bundles(name)
    expected = pastkey.load(bundle, "cpu").generate(PROMPT, max_new_tokens=NEW_TOKENS).text
    with launch(*SWIFTSHADER).new_context() as context:
        context.set_default_timeout(60_000)
        page = context.new_page()
        with loaded(page, site(bundle), "webgpu", headers=ISOLATED) as said:
            assert said["Runs on"].startswith("GPU (WebGPU)")
            assert write(page, PROMPT, maxNewTokens=NEW_TOKENS) == expected


NO_GPU = ("this browser has no WebGPU", "WebGPU finds no graphics adapter")


def test_without_webgpu_the_page_says_why(page, talking):
    asked = """async () => (await (await import("./pastkey.js")).Model.load("./", { provider: "webgpu" })).fallback"""
    with serving(site(talking)) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").wait_for()
        assert page.locator("[value=webgpu]").is_disabled()
        assert page.locator("#no-gpu").text_content() in [f": {why}" for why in NO_GPU]
        assert page.evaluate(asked) in NO_GPU


def test_a_conversation_is_that_of_python_on_one_thread_which_it_says(page, talking):
    chat = pastkey.load(talking, "cpu").chat()
    with loaded(page, site(talking)) as said:
        for question in ("abc", "de"):
            assert write(page, question, maxNewTokens=8) == chat.ask(question, max_new_tokens=8).text
    alone = "one thread, since the page is not cross-origin isolated: see docs/web.md"
    assert said["Runs on"] == f"CPU (WebAssembly), {alone}"
    assert said["Golden logits"].startswith("agree: off by ")
    assert page.locator("dd.warning").count() == 0
    assert page.locator("#log h2").all_text_contents() == ["You", "Model"] * 2


def test_it_is_used_by_the_keyboard_alone(page, talking):
    expected = pastkey.load(talking, "cpu").chat().ask("bcd ef", max_new_tokens=8).text
    keys, prompt = page.keyboard, page.locator("#prompt")

    focus = "[document.activeElement].map(({ id, name, localName }) => id || name || localName)[0]"

    def tabs(times, key="Tab"):
        """What has the focus after each Tab."""
        found = []
        for _ in range(times):
            keys.press(key)
            found.append(page.evaluate(focus))
        return found

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
        assert (prompt.input_value(), page.evaluate(focus)) == ("", "prompt")


def test_stop_ends_a_text_and_continue_goes_on(page, talking):
    with loaded(page, site(talking)):
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
    assert text == pastkey.load(talking, "cpu").chat().ask("abc", max_new_tokens=len(text)).text


def test_a_seed_draws_the_text_of_python(page, bundles):
    bundle = bundles("llama-fp32")
    draw = functools.partial(pastkey.load(bundle, "cpu").generate, temperature=1.5, top_k=50, top_p=0.95, min_p=0.01)
    expected = draw(PROMPT, max_new_tokens=NEW_TOKENS, seed=7).text
    fields = {"temperature": 1.5, "topK": 50, "topP": 0.95, "minP": 0.01, "seed": 7, "maxNewTokens": NEW_TOKENS}
    with loaded(page, site(bundle)):
        assert write(page, PROMPT, **fields) == expected
        assert write(page, PROMPT, **fields | {"stopTexts": expected[4:8]}) == expected[:4]


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_server_of_the_docs_isolates_and_the_page_takes_all_threads(page, talking, tmp_path, command):
    assert command("web", talking, "--out", tmp_path / "page")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = of_docs("python").replace("8000", str(port))
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        try:
            waiting.until(lambda: listens(port))
            said = load(page, f"http://127.0.0.1:{port}/")
            assert len(write(page, "abc", maxNewTokens=4)) == 4
        finally:
            server.kill()
    cores = page.evaluate("navigator.hardwareConcurrency")
    expected = f"{min(cores, 8)} threads" if cores > 1 else "one thread"
    assert said["Runs on"] == f"CPU (WebAssembly), {expected}"


def test_the_program_of_the_docs_writes_the_text_of_python(page, talking):
    expected = pastkey.load(talking, "cpu").generate("abc", temperature=0.8, seed=7, max_new_tokens=64)
    program = of_docs("javascript").replace("Once upon a time", "abc")  # this model has only letters
    files = {f"page/{name}": content for name, content in site(talking).items()}
    body = f'<body><script type="module">{program};document.title = "written"</script>'
    with serving(files | {"index.html": body.encode()}) as (address, _):
        page.goto(address)
        page.wait_for_function("document.title == 'written'")
        text = page.evaluate("[...document.body.childNodes].filter((node) => node.nodeType == 3).map((n) => n.data)")
    assert "".join(text) == expected.text


def test_a_damaged_file_is_refused(page, talking):
    files, name = dict(site(talking)), "golden.f32"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with serving(files) as (address, _):
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
    rules = "axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"

    def require_none():
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate((packages / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
            assert page.evaluate(rules) == []

    with serving(site(talking)) as (address, _):
        page.goto(address)
        page.locator("#load:enabled").wait_for()
        require_none()
        load(page, address)
        write(page, "abc", maxNewTokens=8)
        page.locator("summary", has_text="Sampling").click()
        require_none()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_a_tokenizer_it_takes_and_writes_ids(page, tiny, make_bundle):
    with loaded(page, site(make_bundle(tiny, "standard", data_file="model.onnx_data", golden=True))):
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
        {"logits": np.maximum(vector.logits, -1e30).tolist(), "ids": vector.ids, "seed": str(vector.seed),
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
